import { createClient } from "calotype";
import { afterAll, beforeAll, expect, it, onTestFinished } from "vitest";
import { allowConsole, develop, openPage, recorded, waitForText } from "./browser.js";
import { fingerprint, Service } from "./service_process.js";

/** One generation at a time, no queue, and the same picture on every start. */
const FLAGS = ["--deterministic", "--max-active", "1", "--max-queue", "0"];

let service: Service;

beforeAll(async () => {
  service = await Service.start(FLAGS);
});

afterAll(() => service?.kill());

it("the page explains a full queue", async () => {
  const page = await openPage(service.url);
  await develop(page, "octopus", { Steps: 150 });
  await waitForText(page, /^Step [1-9]\d* of/);
  await develop(page, "fox");
  await waitForText(page, "The service is busy: its queue is full.");
  const ends = service.ended.length + 1;
  await page.getByRole("button", { name: "Cancel" }).click();
  await service.outcome(ends);
});

it("the page resumes and shows the same picture after the service is killed and restarted", async () => {
  const steps = 60;
  allowConsole(/ERR_|Failed to load resource/);
  const page = await openPage(service.url);
  await develop(page, "octopus", { Seed: 5, Steps: steps });
  await waitForText(page, /^Step [1-9]\d* of/);
  await service.kill();
  await waitForText(page, "Reconnecting; the picture will continue");
  const restarted = await Service.start(FLAGS, new URL(service.url).host);
  onTestFinished(() => restarted.kill());
  await waitForText(page, /^Finished/);
  await waitForText(page, "Seed 5");
  await expect.poll(async () => (await recorded(page)).shown.at(-1)?.kind).toBe("final");
  const { shown, percents } = await recorded(page);
  expect(percents).toEqual([...percents].sort((a, b) => a - b));
  const previews = shown.filter(({ kind }) => kind === "predicted").map(({ step }) => step);
  expect(previews).toEqual([...new Set(previews)].sort((a, b) => a - b));
  const { data } = await createClient(restarted.url).generate("octopus", { seed: 5, steps }).result();
  expect(shown.at(-1)?.fingerprint).toBe(fingerprint(data));
}, 240_000);
