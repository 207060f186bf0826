import { readFile } from "node:fs/promises";
import { CalotypeError, createClient, type Progress } from "calotype";
import type { Page } from "playwright-core";
import { build, defaultClientConditions, type Rolldown } from "vite";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import type { Outcome } from "./google_grpc_web.js";
import {
  allowConsole,
  develop,
  expectAccessible,
  openPage,
  recorded,
  screenshot,
  waitForText,
} from "./support/browser.js";
import { fingerprint, Service } from "./support/service_process.js";

/** Enough steps for a test to act before the end. */
const MANY = 120;

/** Steps of generations that do not end before a test does. */
const LONG = 1000;

/** Makes the page request a grace period of 2 seconds. */
const SHORT_GRACE = `
  const setAttribute = Element.prototype.setAttribute;
  Element.prototype.setAttribute = function (name, value) {
    setAttribute.call(this, name, name === "disconnect-grace" ? "2" : value);
  };
`;

describe("with the bundled model", () => {
  let service: Service;

  beforeAll(async () => {
    service = await Service.start(["--max-step-count", String(LONG)]);
  });

  afterEach(() => service.cancelAll());

  afterAll(() => service?.kill());

  /** Returns the number of ended generations after one more has ended. */
  function nextCount(): number {
    return service.ended.length + 1;
  }

  it("the page generates a picture: distinct previews in order, full progress, download and filmstrip", async () => {
    const page = await openPage(service.url, { acceptDownloads: true });
    await develop(page, "hot air balloon", { Seed: 7, Steps: 40 });
    await waitForText(page, /^Step \d+ of 40/);
    await waitForText(page, /^Finished in .* 128\s×\s128\sPNG/);
    await expect.poll(async () => (await recorded(page)).shown.at(-1)?.kind).toBe("final");
    const { shown, percents } = await recorded(page);
    const previews = shown.filter(({ kind }) => kind === "predicted");
    expect(new Set(previews.map(({ fingerprint }) => fingerprint)).size).toBeGreaterThanOrEqual(5);
    expect(shown.map(({ step }) => step)).toEqual([...shown.map(({ step }) => step)].sort((a, b) => a - b));
    expect(percents).toEqual([...percents].sort((a, b) => a - b));
    expect(percents.at(-1)).toBe(100);
    await waitForText(page, "Seed 7");

    const downloading = page.waitForEvent("download");
    await page.getByRole("link", { name: "Download" }).click();
    const download = await downloading;
    expect(download.suggestedFilename()).toBe("hot-air-balloon-7.png");
    expect((await readFile(await download.path())).subarray(1, 4).toString()).toBe("PNG");

    await page.getByRole("slider").press("Home");
    await waitForText(page, /^Estimate at step \d+ of 40$/);
    await expect.poll(async () => (await recorded(page)).shown.at(-1)?.fingerprint).toBe(previews[0]?.fingerprint);
    await expectAccessible(page);
  });

  it("several pictures develop at the same time", async () => {
    const page = await openPage(service.url, { colorScheme: "light", viewport: { width: 1200, height: 820 } });
    for (const prompt of ["red apple", "octopus", "fox"]) await develop(page, prompt, { Seed: 3, Steps: 20 });
    await expect.poll(async () => page.getByText(/^Finished/).count(), { timeout: 30_000 }).toBe(3);
    for (const prompt of ["sailboat", "rose", "owl"]) await develop(page, prompt, { Seed: 4, Steps: 80 });
    await waitForText(page, /^Step [2-7]\d of/);
    await screenshot(page, "light");
    await page.emulateMedia({ colorScheme: "dark" });
    await screenshot(page, "dark");
    await expectAccessible(page);
  });

  it("cancelling on the page ends the work on the server", async () => {
    const ends = nextCount();
    const page = await openPage(service.url);
    await develop(page, "octopus", { Steps: MANY });
    await waitForText(page, /^Step [1-9]\d* of/);
    await page.getByRole("button", { name: "Cancel" }).click();
    expect(await service.outcome(ends)).toBe("CANCELLED");
    await waitForText(page, "Cancelled.");
    const { percents } = await recorded(page);
    expect(percents.at(-1)).toBeLessThan(100);
  });

  it("a picture continues after a reload, and is the same as without one", async () => {
    const steps = 80;
    const page = await openPage(service.url);
    await develop(page, "octopus", { Seed: 5, Steps: steps });
    await waitForText(page, /^Step [1-9]\d* of/);
    await page.reload();
    await waitForText(page, "octopus");
    await waitForText(page, /^Step [1-9]\d* of/);
    await screenshot(page, "reloaded-real");
    await waitForText(page, /^Finished/);
    await expect.poll(async () => (await recorded(page)).shown.at(-1)?.kind).toBe("final");
    const { shown } = await recorded(page);
    expect(shown.filter(({ kind }) => kind === "predicted").length).toBeGreaterThan(0);
    const { data } = await createClient(service.url)
      .generate("octopus", { seed: 5, steps, preview: { method: "none" } })
      .result();
    expect(shown.at(-1)?.fingerprint).toBe(fingerprint(data));
    await page.reload();
    await waitForText(page, /^Finished/);
    await expect.poll(async () => (await recorded(page)).shown.at(-1)?.fingerprint).toBe(fingerprint(data));
  });

  it("two tabs watch one generation, and an early finish gives both the preview that was shown", async () => {
    const page = await openPage(service.url);
    await develop(page, "sailboat", { Seed: 8, Steps: MANY });
    await waitForText(page, /^Step [1-9]\d* of/);
    const opening = page.context().waitForEvent("page");
    await page.getByRole("link", { name: "Open in a new tab: sailboat" }).click();
    const other = await opening;
    await waitForText(other, "sailboat");
    await waitForText(other, /^Step [2-9]\d of/);
    await other.getByRole("button", { name: "Good enough" }).click();
    const early = /^Finished early, at step \d+ of 120, in .* 128\s×\s128\sPNG/;
    await Promise.all([waitForText(page, early), waitForText(other, early)]);
    const last = async (tab: Page) => (await recorded(tab)).shown.at(-1);
    for (const tab of [page, other]) await expect.poll(async () => (await last(tab))?.kind).toBe("final");
    expect(await last(page)).toEqual(await last(other));
    await screenshot(other, "good-enough");
  });

  it("the same seed gives the same picture", async () => {
    const page = await openPage(service.url);
    await develop(page, "rose", { Seed: 11, Steps: 6 });
    await waitForText(page, /^Finished/);
    await page.getByRole("button", { name: "Repeat with this seed" }).click();
    await expect.poll(async () => (await recorded(page)).shown.filter(({ kind }) => kind === "final").length).toBe(2);
    const finals = (await recorded(page)).shown.filter(({ kind }) => kind === "final");
    expect(finals[0]?.fingerprint).toBe(finals[1]?.fingerprint);
  });

  it("the client streams progress, previews and the final picture in Node", async () => {
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

  it("the client lists every violation", async () => {
    const error = await createClient(service.url)
      .generate("", { width: 13, steps: 0 })
      .result()
      .catch((thrown: unknown) => thrown);
    expect(error).toBeInstanceOf(CalotypeError);
    const { code, reason, violations } = error as CalotypeError;
    expect([code, reason]).toEqual(["INVALID_ARGUMENT", "INVALID_REQUEST"]);
    expect(violations.map(({ field }) => field).sort()).toEqual(["prompt", "step_count", "width_px"]);
  });

  describe("Google's grpc-web client in text mode", () => {
    /** Calls `generate` of google_grpc_web.ts from a page of the service without a content security policy. */
    async function generate(...values: [prompt: string, steps: number, leaveAfter?: number]): Promise<Outcome> {
      // Chromium requests a favicon there, which does not exist.
      allowConsole(/404/);
      const page = await openPage(`${service.url}/healthz`);
      await page.addScriptTag({ content: await bundle("google_grpc_web") });
      return page.evaluate<Outcome>(`google_grpc_web.generate(...${JSON.stringify(values)})`);
    }

    it("streams to the end", async () => {
      const { messages, status, error } = await generate("red apple", 20);
      expect(error).toBeUndefined();
      expect(messages.map(({ phase }) => phase)).toEqual(expect.arrayContaining(["QUEUED", "DENOISING", "SUCCEEDED"]));
      expect(messages.filter(({ phase, bytes }) => phase === "DENOISING" && bytes > 0).length).toBeGreaterThanOrEqual(
        5,
      );
      expect(messages.at(-1)?.bytes).toBeGreaterThan(0);
      expect(status?.code).toBe(0);
    });

    it("receives the status of an error", async () => {
      expect((await generate("", 20)).error?.code).toBe(3);
    });

    it("cancels", async () => {
      const ends = nextCount();
      // The client also delivers messages that arrived in the same chunk as the last one.
      const { messages } = await generate("fox", MANY, 6);
      expect(messages.map(({ phase }) => phase)).not.toContain("SUCCEEDED");
      expect(await service.outcome(ends)).toBe("ABANDONED");
    });
  });

  it("leaving the client's loop ends the work on the server", async () => {
    const ends = nextCount();
    for await (const { phase } of createClient(service.url).generate("fox", { steps: MANY })) {
      if (phase === "denoising") break;
    }
    expect(await service.outcome(ends)).toBe("CANCELLED");
  });

  it("closing the tab and leaving the page free their slots after the grace period", async () => {
    const ends = nextCount();
    const tabs = await Promise.all([openPage(service.url), openPage(service.url)]);
    const [closed, left] = tabs;
    for (const page of tabs) {
      // The page sets 30 s, which page_reload.test.ts checks.
      await page.evaluate(SHORT_GRACE);
      await develop(page, "octopus", { Steps: LONG });
      await waitForText(page, /^Step [1-9]\d* of/);
    }
    await closed?.close();
    await left?.goto("about:blank");
    expect([await service.outcome(ends), await service.outcome(ends + 1)]).toEqual(["ABANDONED", "ABANDONED"]);
  });
});

/** Bundles test/NAME.ts into a script that assigns its exports to a global variable of that name. */
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
