import { readFile } from "node:fs/promises";
import { CalotypeError, createClient, type Progress } from "calotype";
import type { Page } from "playwright-core";
import { build, defaultClientConditions, type Rolldown } from "vite";
import { afterAll, beforeAll, describe, expect, it, onTestFinished } from "vitest";
import { develop, expectAccessible, open, recorded, says, shoot, tolerate } from "./browser.js";
import type { Outcome } from "./google_grpc_web.js";
import { Service } from "./service_process.js";

/** Steps enough for a test to act in the midst of them. */
const MANY = 150;

describe("with the bundled model", () => {
  let service: Service;

  beforeAll(async () => {
    service = await Service.start();
  });

  afterAll(() => service?.kill());

  /** How many generations the service will have ended once one more has. */
  function next(): number {
    return service.ended.length + 1;
  }

  it("a prompt becomes a picture: distinct previews in order, a full bar, a file, a filmstrip", async () => {
    const page = await open(service.url, { acceptDownloads: true });
    await develop(page, "hot air balloon", { Seed: 7, Steps: 40 });
    await says(page, /^Step \d+ of 40/);
    await says(page, /^Finished in .* 128\s×\s128\sPNG/);
    await expect.poll(async () => (await recorded(page)).shown.at(-1)?.kind).toBe("final");
    const { shown, percents } = await recorded(page);
    const previews = shown.filter(({ kind }) => kind === "predicted");
    expect(new Set(previews.map(({ fingerprint }) => fingerprint)).size).toBeGreaterThanOrEqual(5);
    expect(shown.map(({ step }) => step)).toEqual([...shown.map(({ step }) => step)].sort((a, b) => a - b));
    expect(percents).toEqual([...percents].sort((a, b) => a - b));
    expect(percents.at(-1)).toBe(100);
    await says(page, "Seed 7");

    const downloading = page.waitForEvent("download");
    await page.getByRole("link", { name: "Download" }).click();
    const download = await downloading;
    expect(download.suggestedFilename()).toBe("hot-air-balloon-7.png");
    expect((await readFile(await download.path())).subarray(1, 4).toString()).toBe("PNG");

    await page.getByRole("slider").press("Home");
    await says(page, /^Estimate at step \d+ of 40$/);
    await expect.poll(async () => (await recorded(page)).shown.at(-1)?.fingerprint).toBe(previews[0]?.fingerprint);
    await expectAccessible(page);
  });

  it("several develop side by side", async () => {
    const page = await open(service.url, { colorScheme: "light", viewport: { width: 1200, height: 820 } });
    for (const prompt of ["red apple", "octopus", "fox"]) await develop(page, prompt, { Seed: 3, Steps: 40 });
    await expect.poll(async () => page.getByText(/^Finished/).count(), { timeout: 30_000 }).toBe(3);
    for (const prompt of ["sailboat", "rose", "owl"]) await develop(page, prompt, { Seed: 4, Steps: MANY });
    await says(page, /^Step [5-9]\d of/);
    await shoot(page, "light");
    await page.emulateMedia({ colorScheme: "dark" });
    await shoot(page, "dark");
    await expectAccessible(page);
  });

  it("cancel ends the work on the server", async () => {
    const ends = next();
    const page = await open(service.url);
    await develop(page, "octopus", { Steps: MANY });
    await says(page, /^Step [1-9]\d* of/);
    await page.getByRole("button", { name: "Cancel" }).click();
    expect(await service.outcome(ends)).toBe("CANCELLED");
    await says(page, "Cancelled.");
    const { percents } = await recorded(page);
    expect(percents.at(-1)).toBeLessThan(100);
  });

  it("a picture goes on after a reload, and is the same that it would have been", async () => {
    const page = await open(service.url);
    await develop(page, "octopus", { Seed: 5, Steps: MANY });
    await says(page, /^Step [1-9]\d* of/);
    await page.reload();
    await says(page, "octopus");
    await says(page, /^Step [1-9]\d* of/);
    await shoot(page, "reloaded-real");
    await says(page, /^Finished/);
    await expect.poll(async () => (await recorded(page)).shown.at(-1)?.kind).toBe("final");
    const { shown } = await recorded(page);
    expect(shown.filter(({ kind }) => kind === "predicted").length).toBeGreaterThan(0);
    const { data } = await createClient(service.url).generate("octopus", { seed: 5, steps: MANY }).result();
    expect(shown.at(-1)?.fingerprint).toBe(fingerprint(data));
    await page.reload();
    await says(page, /^Finished/);
    await expect.poll(async () => (await recorded(page)).shown.at(-1)?.fingerprint).toBe(fingerprint(data));
  });

  it("two tabs watch one generation, and good enough gives both the picture that was seen", async () => {
    const page = await open(service.url);
    await develop(page, "sailboat", { Seed: 8, Steps: MANY });
    await says(page, /^Step [1-9]\d* of/);
    const opening = page.context().waitForEvent("page");
    await page.getByRole("link", { name: "Open on its own: sailboat" }).click();
    const other = await opening;
    await says(other, "sailboat");
    await says(other, /^Step [2-9]\d of/);
    await other.getByRole("button", { name: "Good enough" }).click();
    const early = /^Finished early, at step \d+ of 150, in .* 128\s×\s128\sPNG/;
    await Promise.all([says(page, early), says(other, early)]);
    const last = async (tab: Page) => (await recorded(tab)).shown.at(-1);
    for (const tab of [page, other]) await expect.poll(async () => (await last(tab))?.kind).toBe("final");
    expect(await last(page)).toEqual(await last(other));
    await shoot(other, "good-enough");
  });

  it("the same seed gives the same picture", async () => {
    const page = await open(service.url);
    await develop(page, "rose", { Seed: 11, Steps: 6 });
    await says(page, /^Finished/);
    await page.getByRole("button", { name: "Again with this seed" }).click();
    await expect.poll(async () => (await recorded(page)).shown.filter(({ kind }) => kind === "final").length).toBe(2);
    const finals = (await recorded(page)).shown.filter(({ kind }) => kind === "final");
    expect(finals[0]?.fingerprint).toBe(finals[1]?.fingerprint);
  });

  it("the client streams in Node: progress, previews, the final picture", async () => {
    const messages: Progress[] = [];
    for await (const progress of createClient(service.url).generate("red apple", { seed: 1 })) messages.push(progress);
    expect(messages[0]?.phase).toBe("queued");
    expect(messages.filter(({ picture }) => picture?.kind === "predicted").length).toBeGreaterThanOrEqual(5);
    expect(messages.at(-1)).toMatchObject({
      phase: "succeeded",
      seed: 1,
      picture: { kind: "final", format: "png", width: 128 },
    });
  });

  it("the client names every violation", async () => {
    const refused = await createClient(service.url)
      .generate("", { width: 13, steps: 0 })
      .result()
      .catch((error: unknown) => error);
    expect(refused).toBeInstanceOf(CalotypeError);
    const { code, reason, violations } = refused as CalotypeError;
    expect([code, reason]).toEqual(["INVALID_ARGUMENT", "INVALID_REQUEST"]);
    expect(violations.map(({ field }) => field).sort()).toEqual(["prompt", "step_count", "width_px"]);
  });

  describe("the classic grpc-web client in text mode", () => {
    /** Calls `generate` of classic.ts from a page of the service that has no policy against it. */
    async function classic(...values: [prompt: string, steps: number, leaveAfter?: number]): Promise<Outcome> {
      // Chromium asks for an icon there.
      tolerate(/404/);
      const page = await open(`${service.url}/healthz`);
      await page.addScriptTag({ content: await bundle("google_grpc_web") });
      return page.evaluate<Outcome>(`google_grpc_web.generate(...${JSON.stringify(values)})`);
    }

    it("streams to the end", async () => {
      const { messages, status, error } = await classic("red apple", 20);
      expect(error).toBeUndefined();
      expect(messages.map(({ phase }) => phase)).toEqual(expect.arrayContaining(["QUEUED", "DENOISING", "SUCCEEDED"]));
      expect(messages.filter(({ phase, bytes }) => phase === "DENOISING" && bytes > 0).length).toBeGreaterThanOrEqual(
        5,
      );
      expect(messages.at(-1)?.bytes).toBeGreaterThan(0);
      expect(status?.code).toBe(0);
    });

    it("gets the status of an error", async () => {
      expect((await classic("", 20)).error?.code).toBe(3);
    });

    it("cancels", async () => {
      const ends = next();
      // It delivers what arrived in one piece with the last message, too.
      const { messages } = await classic("fox", MANY, 6);
      expect(messages.map(({ phase }) => phase)).not.toContain("SUCCEEDED");
      expect(await service.outcome(ends)).toBe("ABANDONED");
    });
  });

  it("leaving the client's loop ends the work on the server", async () => {
    const ends = next();
    for await (const { phase } of createClient(service.url).generate("fox", { steps: MANY })) {
      if (phase === "denoising") break;
    }
    expect(await service.outcome(ends)).toBe("CANCELLED");
  });
});

/** Bundles test/NAME.ts into a script that leaves its exports in a global of that name. */
async function bundle(name: string): Promise<string> {
  const built = await build({
    configFile: false,
    logLevel: "silent",
    resolve: { conditions: ["source", ...defaultClientConditions] },
    build: { write: false, lib: { entry: new URL(`${name}.ts`, import.meta.url).pathname, formats: ["iife"], name } },
  });
  const [{ output }] = built as [Rolldown.RolldownOutput];
  return output[0].code;
}

/** As the recorder of browser.ts counts. */
function fingerprint(data: Uint8Array): number {
  return data.reduce((hash, byte) => (hash * 31 + byte) >>> 0, 7);
}

it("closing the tab and leaving the page free their slots, once nobody has come back for a while", async () => {
  // So many, and so large, that they last longer than that.
  const steps = 1000;
  const service = await Service.start(["--max-step-count", String(steps)]);
  onTestFinished(() => service.kill());
  const [closed, left] = await Promise.all([open(service.url), open(service.url)]);
  for (const page of [closed, left]) {
    await develop(page, "octopus", { Steps: steps, Width: 256, Height: 256 });
    await says(page, /^Step [1-9]\d* of/);
  }
  await closed.close();
  await left.goto("about:blank");
  expect([await service.outcome(1), await service.outcome(2)]).toEqual(["ABANDONED", "ABANDONED"]);
});

it("a service that is killed and started again: the page goes on by itself to the same picture", async () => {
  const steps = 60;
  const first = await Service.start(["--deterministic"]);
  onTestFinished(() => first.kill());
  tolerate(/ERR_|Failed to load resource/);
  const page = await open(first.url);
  await develop(page, "octopus", { Seed: 5, Steps: steps });
  await says(page, /^Step [1-9]\d* of/);
  await first.kill();
  await says(page, "Reconnecting; the picture goes on");
  const second = await Service.start(["--deterministic"], new URL(first.url).host);
  onTestFinished(() => second.kill());
  await says(page, /^Finished/);
  await says(page, "Seed 5");
  await expect.poll(async () => (await recorded(page)).shown.at(-1)?.kind).toBe("final");
  const { shown, percents } = await recorded(page);
  expect(percents).toEqual([...percents].sort((a, b) => a - b));
  const previews = shown.filter(({ kind }) => kind === "predicted").map(({ step }) => step);
  expect(previews).toEqual([...new Set(previews)].sort((a, b) => a - b));
  const { data } = await createClient(second.url).generate("octopus", { seed: 5, steps }).result();
  expect(shown.at(-1)?.fingerprint).toBe(fingerprint(data));
}, 240_000);

it("a full queue is told in plain words", async () => {
  const service = await Service.start(["--max-active", "1", "--max-queue", "0"]);
  onTestFinished(() => service.kill());
  const page = await open(service.url);
  await develop(page, "octopus", { Steps: MANY });
  await says(page, /^Step [1-9]\d* of/);
  await develop(page, "fox");
  await says(page, "The service is busy: its queue is full.");
});
