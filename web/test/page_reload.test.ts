import type { Page } from "playwright-core";
import { describe, expect, it } from "vitest";
import {
  allowConsole,
  develop,
  expectAccessible,
  openPage,
  printWithText,
  recorded,
  screenshot,
  waitForText,
} from "./support/browser.js";
import {
  disconnected,
  final,
  Phase,
  preview,
  progress,
  ScriptedGeneration,
  serveScripted,
} from "./support/scripted_service.js";

const QUEUED = progress({
  sequence: 1n,
  phase: Phase.QUEUED,
  queuePosition: 3,
  totalSteps: 0,
  estimatedRemaining: { $typeName: "google.protobuf.Duration", seconds: 12n, nanos: 0 },
});

describe("after a reload", () => {
  it("a running picture continues, and a finished one is still shown", async () => {
    const generation = new ScriptedGeneration();
    const { url } = await serveScripted(generation.handlers);
    const page = await openPage(url);
    await develop(page, "sunrise over a calm sea");
    generation.send(preview(1), preview(2), preview(3));
    await waitForText(page, "Step 3 of 8");
    await page.reload();
    await waitForText(page, "sunrise over a calm sea");
    await waitForText(page, "Step 3 of 8");
    await expect.poll(async () => (await recorded(page)).shown.at(-1)?.step).toBe(3);
    await screenshot(page, "reloaded");
    generation.send(preview(4), final());
    await waitForText(page, /^Finished/);
    await page.reload();
    await waitForText(page, /^Finished/);
    await expect.poll(async () => (await recorded(page)).shown.at(-1)?.kind).toBe("final");
    expect(generation.requests).toHaveLength(1);
    expect(generation.requests[0]?.disconnectGrace?.seconds).toBe(30n);
    expect(generation.cancelled).toEqual([]);
    await page.getByRole("button", { name: "Repeat with this seed" }).click();
    await expect.poll(() => generation.requests[1]?.seed).toBe(42n);
  });

  it("a picture that the service loses later is started again with the same seed", async () => {
    const generation = new ScriptedGeneration();
    const { url, stub } = await serveScripted(generation.handlers);
    allowConsole(/ERR_|Failed to load resource/);
    const page = await openPage(url);
    await develop(page, "sunrise", { Steps: 8 });
    generation.send(preview(1));
    await waitForText(page, "Step 1 of 8");
    await page.reload();
    await waitForText(page, "Step 1 of 8");
    generation.isLost = true;
    stub.dropConnections();
    await expect.poll(() => generation.requests[1]).toMatchObject({ prompt: "sunrise", seed: 42n, stepCount: 8 });
    generation.isLost = false;
    generation.send(preview(2), final());
    await waitForText(page, /^Finished/);
    await page.reload();
    await waitForText(page, /^Finished/);
  });

  it("lost, cancelled and removed pictures are gone, without an error", async () => {
    const generation = new ScriptedGeneration();
    const { url } = await serveScripted(generation.handlers);
    const page = await openPage(url);
    await develop(page, "sunrise");
    generation.send(preview(1));
    await waitForText(page, "Step 1 of 8");
    generation.isLost = true;
    await page.reload();
    await expect.poll(async () => page.locator(".print").count()).toBe(0);
    await page.locator("#introduction").waitFor();
    expect(await page.getByRole("alert").filter({ visible: true }).count()).toBe(0);
    generation.isLost = false;
    for (const button of ["Cancel", "Remove: sunrise"]) {
      await develop(page, "sunrise");
      await waitForText(page, "Step 1 of 8");
      await page.getByRole("button", { name: button }).click();
      await expect.poll(() => generation.cancelled.splice(0)).toEqual(["g"]);
      await page.reload();
      await page.locator("#develop:enabled").waitFor();
      expect(await page.locator(".print").count()).toBe(0);
    }
  });

  it("waiting pictures start, and none starts twice", async () => {
    const started = new Map<string, bigint | undefined>();
    const { url } = await serveScripted({
      async *generate({ requestId, seed = 0n }, context) {
        started.set(requestId, seed);
        yield { ...preview(1), generationId: `g${seed}`, seed };
        await disconnected(context);
      },
      async *watch({ generationId }, context) {
        yield { ...preview(1), generationId, seed: BigInt(generationId.slice(1)) };
        await disconnected(context);
      },
    });
    const page = await openPage(url);
    await develop(page, "sunrise", { Seed: 1, Pictures: 6 });
    await expect.poll(async () => page.getByText("Step 1 of 8").count()).toBe(4);
    await page.reload();
    await expect.poll(async () => page.getByText("Step 1 of 8").count()).toBe(4);
    await expect.poll(async () => page.getByText("Waiting for a free connection").count()).toBe(2);
    expect([...started.values()]).toEqual([1n, 2n, 3n, 4n]);
    await printWithText(page, "Seed 1").getByRole("button", { name: "Remove" }).click();
    await expect.poll(() => [...started.values()]).toEqual([1n, 2n, 3n, 4n, 5n]);
  });
});

describe("a second tab", () => {
  it("watches the same generation, and an early finish in one tab applies to both", async () => {
    const generation = new ScriptedGeneration();
    const { url } = await serveScripted(generation.handlers);
    const page = await openPage(url);
    await develop(page, "sunrise over a calm sea");
    generation.send(QUEUED);
    await waitForText(page, /^Position 3/);
    expect(await page.getByRole("button", { name: "Good enough" }).count()).toBe(0);
    generation.send(preview(1), preview(2));
    await waitForText(page, "Step 2 of 8");
    const opening = page.context().waitForEvent("page");
    await page.getByRole("link", { name: "Open in a new tab: sunrise over a calm sea" }).click();
    const other = await opening;
    await waitForText(other, "sunrise over a calm sea");
    await waitForText(other, "Step 2 of 8");
    generation.send(preview(5));
    await Promise.all([waitForText(page, "Step 5 of 8"), waitForText(other, "Step 5 of 8")]);
    await expectAccessible(other);
    await screenshot(other, "second-tab");
    await other.getByRole("button", { name: "Good enough" }).press("Enter");
    const early = "Finished early, at step 5 of 8 · 64 × 48 PNG";
    await Promise.all([waitForText(page, early), waitForText(other, early)]);
    await screenshot(page, "finished-early");
    const last = async (tab: Page) => (await recorded(tab)).shown.at(-1);
    for (const tab of [page, other]) await expect.poll(async () => (await last(tab))?.kind).toBe("final");
    expect(await last(page)).toEqual(await last(other));
    expect(generation.requests).toHaveLength(1);
  });

  it("can be closed or cleared without ending the generation of the first", async () => {
    const generation = new ScriptedGeneration();
    const { url } = await serveScripted(generation.handlers);
    const page = await openPage(url);
    await develop(page, "sunrise");
    generation.send(preview(1));
    await waitForText(page, "Step 1 of 8");
    const other = await page.context().newPage();
    await other.goto(`${url}/#watch=g`);
    await waitForText(other, "Step 1 of 8");
    await other.getByRole("button", { name: "Remove" }).click();
    await other.close();
    generation.send(preview(2));
    await waitForText(page, "Step 2 of 8");
    expect(generation.cancelled).toEqual([]);
  });

  it("shows an error if there is no such picture", async () => {
    const { url } = await serveScripted(new ScriptedGeneration().handlers);
    const page = await openPage(`${url}/#watch=nothing`);
    await waitForText(page, "The service no longer has this picture.");
    await expectAccessible(page);
  });
});
