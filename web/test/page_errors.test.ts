import { describe, expect, it } from "vitest";
import {
  allowConsole,
  develop,
  expectAccessible,
  openPage,
  recorded,
  screenshot,
  waitForText,
} from "./support/browser.js";
import {
  BadRequestSchema,
  Code,
  ConnectError,
  disconnected,
  ErrorInfoSchema,
  final,
  Gate,
  MODEL,
  Phase,
  preview,
  progress,
  RetryInfoSchema,
  ScriptedGeneration,
  serveScripted,
} from "./support/scripted_service.js";

describe("the page, if something goes wrong,", () => {
  it("reconnects automatically, without an error, and keeps the picture", async () => {
    const generation = new ScriptedGeneration();
    const { url, stub } = await serveScripted(generation.handlers);
    allowConsole(/ERR_|Failed to load resource/);
    const page = await openPage(url);
    await develop(page, "sunrise");
    generation.send(preview(1), preview(2));
    await waitForText(page, "Step 2 of 8");
    await expect.poll(async () => (await recorded(page)).shown.length).toBe(2);
    generation.isUnavailable = true;
    stub.dropConnections();
    await waitForText(page, "Reconnecting; the picture will continue");
    expect(await page.locator("calotype-view img.layer").count()).toBeGreaterThan(0);
    expect(await page.getByRole("alert").filter({ visible: true }).count()).toBe(0);
    await expectAccessible(page);
    await screenshot(page, "reconnecting");
    generation.isUnavailable = false;
    generation.send(preview(3), final());
    await waitForText(page, /^Finished/);
    expect(generation.requests).toHaveLength(1);
    expect(generation.cancelled).toEqual([]);
    await expect.poll(async () => (await recorded(page)).shown.map(({ step }) => step)).toEqual([1, 2, 3, 8]);
  });

  it("can cancel while it reconnects", async () => {
    const generation = new ScriptedGeneration();
    const { url, stub } = await serveScripted(generation.handlers);
    allowConsole(/ERR_|Failed to load resource/);
    const page = await openPage(url);
    await develop(page, "sunrise");
    generation.send(preview(1));
    await waitForText(page, "Step 1 of 8");
    generation.isUnavailable = true;
    stub.dropConnections();
    await waitForText(page, /^Reconnecting/);
    await page.getByRole("button", { name: "Cancel" }).click();
    await waitForText(page, "Cancelled.");
    await expect.poll(() => generation.cancelled).toEqual(["g"]);
  });

  it("continues with the same seed if the service shut down, and its successor too", async () => {
    const seeds: (bigint | undefined)[] = [];
    const { url } = await serveScripted({
      async *generate({ seed }) {
        seeds.push(seed);
        yield preview(1);
        const error = { $typeName: "calotype.v1.Error", code: 14, reason: "DRAINING", message: "" } as const;
        if (seeds.length < 3) yield progress({ sequence: 3n, phase: Phase.FAILED, error });
        yield final();
      },
    });
    const page = await openPage(url);
    await develop(page, "sunrise");
    await waitForText(page, "Finished");
    expect(seeds).toEqual([undefined, 42n, 42n]);
    expect(await page.getByRole("alert").filter({ visible: true }).count()).toBe(0);
  });

  it("offers to continue a picture started elsewhere if its service shut down", async () => {
    let calls = 0;
    const { url } = await serveScripted({
      async *watch() {
        calls += 1;
        yield preview(1);
        const error = { $typeName: "calotype.v1.Error", code: 14, reason: "DRAINING", message: "" } as const;
        if (calls === 1) yield progress({ sequence: 3n, phase: Phase.FAILED, error });
        yield final();
      },
      listGenerations: () => ({ generations: [] }),
    });
    const page = await openPage(`${url}/#watch=g`);
    await waitForText(page, "The service is shutting down.");
    await expectAccessible(page);
    await screenshot(page, "lost");
    await page.getByRole("button", { name: "Continue" }).click();
    await waitForText(page, "Finished");
    expect(await page.getByRole("alert").filter({ visible: true }).count()).toBe(0);
  });

  it("says that the service is loading after a restart, and continues the picture by itself", async () => {
    let calls = 0;
    const opened = new Gate();
    const notReady = () =>
      new ConnectError("", Code.Unavailable, undefined, [
        { desc: ErrorInfoSchema, value: { reason: "NOT_READY" } },
        { desc: RetryInfoSchema, value: { retryDelay: { nanos: 50_000_000 } } },
      ]);
    let isLoading = true;
    const { url } = await serveScripted({
      async *generate() {
        calls += 1;
        if (isLoading) throw notReady();
        yield preview(1);
        await opened.opened;
        yield final();
      },
    });
    const page = await openPage(url);
    await develop(page, "sunrise");
    await waitForText(page, "The service is loading its model; the picture will follow");
    await expectAccessible(page);
    await screenshot(page, "loading");
    expect(await page.getByRole("alert").filter({ visible: true }).count()).toBe(0);
    await expect.poll(() => calls).toBeGreaterThan(1);
    isLoading = false;
    await waitForText(page, "Step 1 of 8");
    opened.open();
    await waitForText(page, /^Finished/);
  });

  it("lists every invalid field with the label of the form", async () => {
    const { url } = await serveScripted({
      // biome-ignore lint/correctness/useYield: it fails before the first message.
      async *generate() {
        const fieldViolations = [
          { field: "prompt", description: "has 101 characters, at most 100 are accepted" },
          { field: "step_count", description: "is 99, must be 1 to 50" },
        ];
        throw new ConnectError("raw text", Code.InvalidArgument, undefined, [
          { desc: BadRequestSchema, value: { fieldViolations } },
        ]);
      },
    });
    const page = await openPage(url);
    await develop(page, "sunrise");
    await waitForText(page, "The request is invalid.");
    const items = await page.getByRole("alert").getByRole("listitem").allTextContents();
    expect(items).toEqual(["Prompt has 101 characters, at most 100 are accepted", "Steps is 99, must be 1 to 50"]);
    expect(await page.getByText("raw text").count()).toBe(0);
    await screenshot(page, "invalid");
  });

  it("shows the retry delay of a full queue, and has a button to retry", async () => {
    let calls = 0;
    const { url } = await serveScripted({
      async *generate() {
        calls += 1;
        if (calls === 1) {
          throw new ConnectError("", Code.ResourceExhausted, undefined, [
            { desc: ErrorInfoSchema, value: { reason: "QUEUE_FULL" } },
            { desc: RetryInfoSchema, value: { retryDelay: { seconds: 4n } } },
          ]);
        }
        yield final();
      },
    });
    const page = await openPage(url);
    await develop(page, "sunrise");
    await waitForText(page, /queue is full/);
    await waitForText(page, /Wait 4\.0 s/);
    await page.getByRole("button", { name: "Try again" }).click();
    await waitForText(page, "Finished");
  });

  it("waits for a service that is still loading its model", async () => {
    let calls = 0;
    const { url } = await serveScripted({
      getModel() {
        calls += 1;
        if (calls === 1)
          throw new ConnectError("", Code.Unavailable, undefined, [
            { desc: ErrorInfoSchema, value: { reason: "NOT_READY" } },
            { desc: RetryInfoSchema, value: { retryDelay: { seconds: 1n } } },
          ]);
        return MODEL;
      },
    });
    const page = await openPage(url);
    await page.getByText("The model is still loading.").waitFor();
    await page.getByText("This page continues by itself.").waitFor();
    expect(await page.getByRole("button", { name: "Develop" }).isDisabled()).toBe(true);
    await page.locator("#develop:enabled").waitFor();
    expect(await page.getByRole("alert").filter({ visible: true }).count()).toBe(0);
  });

  it("cancels with the keyboard, and moves the focus", async () => {
    const left = new Gate();
    const { url } = await serveScripted({
      async *generate(_request, context) {
        yield preview(1);
        await disconnected(context);
        left.open();
      },
    });
    const page = await openPage(url);
    await develop(page, "sunrise");
    await waitForText(page, "Step 1 of 8");
    await page.getByRole("button", { name: "Cancel" }).press("Enter");
    await left.opened;
    await waitForText(page, "Cancelled.");
    expect(await page.evaluate(() => document.activeElement?.shadowRoot?.activeElement?.textContent)).toBe("Try again");
  });
});
