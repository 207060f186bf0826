import { createClient } from "calotype";
import { afterAll, beforeAll, expect, it, onTestFinished } from "vitest";
import { allowConsole, develop, openPage, recorded, waitForText } from "./support/browser.js";
import { fingerprint, Service } from "./support/service_process.js";
import { TcpProxy } from "./support/tcp_proxy.js";

/** One generation at a time, no queue, and the same picture from every process. */
const FLAGS = ["--deterministic", "--max-active", "1", "--max-queue", "0"];

let service: Service;
/** Takes over from `service`. It starts early, because a busy machine needs longer than the page retries. */
let successor: Service;

beforeAll(async () => {
  [service, successor] = await Promise.all([Service.start(FLAGS), Service.start(FLAGS)]);
}, 240_000);

afterAll(async () => {
  await Promise.all([service, successor].map((each) => each?.kill()));
});

it("the page explains a full queue", async () => {
  const page = await openPage(service.url);
  await develop(page, "octopus", { Steps: 150 });
  await waitForText(page, /^Step [1-9]\d* of/);
  await develop(page, "fox");
  await waitForText(page, "The service is busy: its queue is full.");
  await service.cancelAll();
});

it("the page resumes and shows the same picture after the service is killed and replaced by a new process", async () => {
  const steps = 60;
  allowConsole(/ERR_|Failed to load resource/);
  const proxy = await new TcpProxy(service.url).listen();
  onTestFinished(() => proxy.close());
  const page = await openPage(proxy.url);
  await develop(page, "octopus", { Seed: 5, Steps: steps });
  await waitForText(page, /^Step [1-9]\d* of/);
  await service.kill();
  await waitForText(page, "Reconnecting; the picture will continue");
  proxy.switchTo(successor.url);
  await waitForText(page, /^Finished/);
  await waitForText(page, "Seed 5");
  await expect.poll(async () => (await recorded(page)).shown.at(-1)?.kind).toBe("final");
  const { shown, percents } = await recorded(page);
  expect(percents).toEqual([...percents].sort((a, b) => a - b));
  const previews = shown.filter(({ kind }) => kind === "predicted").map(({ step }) => step);
  expect(previews).toEqual([...new Set(previews)].sort((a, b) => a - b));
  const options = { seed: 5, steps, preview: { method: "none" } } as const;
  const { data } = await createClient(successor.url).generate("octopus", options).result();
  expect(shown.at(-1)?.fingerprint).toBe(fingerprint(data));
}, 240_000);
