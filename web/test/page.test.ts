import type { Page } from "playwright-core";
import { describe, expect, it } from "vitest";
import { develop, expectAccessible, open, printOf, recorded, says, shoot, tolerate } from "./browser.js";
import {
  BadRequestSchema,
  Code,
  ConnectError,
  ErrorInfoSchema,
  final,
  Gate,
  gone,
  MODEL,
  Phase,
  Played,
  PreviewMethod,
  pretend,
  preview,
  progress,
  RetryInfoSchema,
} from "./scripted_service.js";

const QUEUED = progress({
  sequence: 1n,
  phase: Phase.QUEUED,
  queuePosition: 3,
  totalSteps: 0,
  estimatedRemaining: { $typeName: "google.protobuf.Duration", seconds: 12n, nanos: 0 },
});

/** A generation with eight steps that goes on whenever the test opens the gate. */
async function* steps(until = 8) {
  for (let step = 1; step <= until; step += 1) yield preview(step);
}

describe("a picture that develops", () => {
  it("shows the queue, the steps, and the end, and is accessible in each", async () => {
    const [start, half, end] = [new Gate(), new Gate(), new Gate()];
    const { url } = await pretend({
      async *generate() {
        yield QUEUED;
        await start.opened;
        yield* steps(4);
        await half.opened;
        yield preview(5);
        await end.opened;
        yield final();
      },
    });
    const page = await open(url);
    await develop(page, "sunrise over a calm sea");
    await says(page, "Place 3 in the queue · about 12 s left");
    await expectAccessible(page);
    await shoot(page, "queued");
    start.open();
    await says(page, "Step 4 of 8");
    expect(await page.getByRole("progressbar").getAttribute("aria-valuenow")).toBe("44");
    await expectAccessible(page);
    half.open();
    await says(page, "Step 5 of 8");
    end.open();
    await says(page, "Finished · 64 × 48 PNG");
    await expectAccessible(page);
    const { shown, percents } = await recorded(page);
    const order = shown.map(({ step }) => step);
    expect(order).toEqual([...new Set(order)].sort((a, b) => a - b));
    expect([order[0], order.at(-1)]).toEqual([1, 8]);
    expect(percents).toEqual([...percents].sort((a, b) => a - b));
    expect(percents.at(-1)).toBe(100);
  });

  it("is looked back at with the keyboard", async () => {
    const { url } = await pretend({
      async *generate() {
        yield* steps();
        yield final();
      },
    });
    const page = await open(url);
    await develop(page, "sunrise");
    await says(page, "Finished");
    const slider = page.getByRole("slider");
    await slider.focus();
    await page.keyboard.press("Home");
    await says(page, "Estimate at step 1 of 8");
    expect(await slider.getAttribute("aria-valuetext")).toBe("Estimate at step 1 of 8");
    await page.keyboard.press("ArrowRight");
    await says(page, "Estimate at step 2 of 8");
    await expect.poll(async () => (await recorded(page)).shown.at(-1)?.step).toBe(2);
    expect(await page.getByRole("img", { name: "sunrise. Estimate at step 2 of 8" }).count()).toBe(1);
    await page.keyboard.press("End");
    await says(page, "Finished");
  });

  it("is taken off, and its memory released, when its previews are withdrawn", async () => {
    const withdraw = new Gate();
    const { url } = await pretend({
      async *generate() {
        yield* steps(3);
        await withdraw.opened;
        yield progress({ sequence: 5n, phase: Phase.DECODING, step: 8, previewsWithdrawn: true });
        yield progress({
          sequence: 6n,
          phase: Phase.FAILED,
          previewsWithdrawn: true,
          error: { $typeName: "calotype.v1.Error", code: 9, reason: "CONTENT_WITHHELD", message: "" },
        });
      },
    });
    const page = await open(url);
    await develop(page, "x");
    await says(page, "Step 3 of 8");
    await expect.poll(async () => (await recorded(page)).shown.length).toBe(3);
    withdraw.open();
    await says(page, "This picture is withheld.");
    expect(await page.locator("calotype-view img").count()).toBe(0);
    const { urls } = await recorded(page);
    expect(urls.released).toBe(urls.made);
    expect(await page.getByRole("slider").count()).toBe(0);
  });

  it("keeps nothing in memory once it is removed", async () => {
    const { url } = await pretend({
      async *generate() {
        yield* steps();
        yield final();
      },
    });
    const page = await open(url);
    await develop(page, "sunrise");
    await says(page, "Finished");
    await page.getByRole("button", { name: "Remove: sunrise" }).click();
    await expect.poll(async () => page.locator(".print").count()).toBe(0);
    const { urls } = await recorded(page);
    expect(urls.made).toBeGreaterThan(0);
    expect(urls.released).toBe(urls.made);
    expect(await page.evaluate(() => document.activeElement?.id)).toBe("prompt");
  });

  it("animates nothing but opacity, and nothing at all with reduced motion", async () => {
    const last = new Gate();
    const { url } = await pretend({
      async *generate() {
        yield preview(1);
        yield preview(2);
        await last.opened;
        yield final();
      },
    });
    const spy = `
      window.animated = [];
      const animate = Element.prototype.animate;
      Element.prototype.animate = function (frames, timing) { animated.push(Object.keys(frames)); return animate.call(this, frames, timing); };
    `;
    for (const reducedMotion of ["no-preference", "reduce"] as const) {
      const page = await open(url, { reducedMotion });
      await page.evaluate(spy);
      await develop(page, "sunrise");
      await says(page, reducedMotion === "reduce" ? "Finished" : "Step 2 of 8");
      last.open();
      await expect.poll(async () => (await recorded(page)).shown.at(-1)?.kind).toBe("final");
      const animated = await page.evaluate<string[][]>("animated");
      if (reducedMotion === "reduce") expect(animated).toEqual([]);
      else expect(new Set(animated.flat())).toEqual(new Set(["opacity"]));
    }
  });

  it("is not drawn while nobody looks, and shows the newest when somebody does", async () => {
    const [rest, end] = [new Gate(), new Gate()];
    const { url } = await pretend({
      async *generate() {
        yield preview(1);
        await rest.opened;
        for (const step of [2, 3, 4, 5, 6]) yield preview(step);
        await end.opened;
        yield final();
      },
    });
    const page = await open(url);
    await develop(page, "sunrise");
    await expect.poll(async () => (await recorded(page)).shown.length).toBe(1);
    await page.evaluate("Object.defineProperty(document, 'hidden', { value: true, configurable: true })");
    rest.open();
    await says(page, "Step 6 of 8");
    expect((await recorded(page)).shown).toHaveLength(1);
    await page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))");
    await expect.poll(async () => (await recorded(page)).shown.at(-1)?.step).toBe(6);
    end.open();
    await says(page, /^Finished/);
  });
});

describe("several pictures", () => {
  it("run four at a time, and leave connections for other calls", async () => {
    const finish = new Gate();
    let running = 0;
    let most = 0;
    const cancelled: string[] = [];
    const { url } = await pretend({
      async *generate({ seed }, context) {
        running += 1;
        most = Math.max(most, running);
        try {
          yield progress({ sequence: 1n, phase: Phase.DENOISING, seed: seed ?? 0n });
          await Promise.race([finish.opened, gone(context)]);
          if (context.signal.aborted) cancelled.push(String(seed));
          yield final();
        } finally {
          running -= 1;
        }
      },
    });
    const page = await open(url);
    await develop(page, "sunrise", { Seed: 10, Pictures: 7 });
    await expect.poll(() => running).toBe(4);
    await expect.poll(async () => page.getByText("Waiting for a free connection").count()).toBe(3);
    // A call that is not a stream still gets through.
    const answer = await page.evaluate(async () => (await fetch("favicon.svg")).status);
    expect(answer).toBe(200);
    await shoot(page, "side-by-side");
    expect(most).toBe(4);
    await printOf(page, "Seed 10").getByRole("button", { name: "Cancel" }).click();
    await expect.poll(() => cancelled).toEqual(["10"]);
    await expect.poll(async () => page.getByText("Waiting for a free connection").count()).toBe(2);
    finish.open();
    await expect.poll(async () => page.getByText(/^Finished/).count()).toBe(6);
  });

  it("share the connections with those of other tabs, whose calls get through", async () => {
    const [finish, running] = [new Gate(), new Set<string>()];
    let cancelled = 0;
    const { url } = await pretend({
      async *generate({ requestId, seed = 0n }, context) {
        running.add(requestId);
        yield { ...preview(1), generationId: requestId, seed };
        await Promise.race([finish.opened, gone(context)]);
        yield final();
      },
      cancel() {
        cancelled += 1;
        return {};
      },
    });
    const page = await open(url);
    await develop(page, "sunrise", { Seed: 1, Pictures: 3 });
    await expect.poll(() => running.size).toBe(3);
    const other = await page.context().newPage();
    await other.goto(url);
    await develop(other, "sunset", { Seed: 4, Pictures: 3 });
    await expect.poll(() => running.size).toBe(4);
    await expect.poll(async () => other.getByText("Waiting for a free connection").count()).toBe(2);
    expect(running.size).toBe(4);
    await page.getByRole("button", { name: "Cancel" }).first().click();
    await expect.poll(() => cancelled).toBe(1);
    await expect.poll(() => running.size).toBe(5);
    // What a closed tab held is free again.
    await page.close();
    await expect.poll(() => running.size).toBe(6);
    finish.open();
    await expect.poll(async () => other.getByText(/^Finished/).count()).toBe(3);
  });

  it("get seeds of their own, counted up", async () => {
    const seeds: bigint[] = [];
    const { url } = await pretend({
      async *generate({ seed }) {
        seeds.push(seed ?? -1n);
        yield final();
      },
    });
    const page = await open(url);
    await develop(page, "sunrise", { Seed: 5, Pictures: 3 });
    await expect.poll(() => [...seeds].sort()).toEqual([5n, 6n, 7n]);
  });

  it("are made again with the same seed and settings", async () => {
    const requests: { prompt: string; seed?: bigint; stepCount?: number }[] = [];
    const { url } = await pretend({
      async *generate(request) {
        requests.push(request);
        yield final();
      },
    });
    const page = await open(url);
    await develop(page, "sunrise", { Steps: 12 });
    await page.getByRole("button", { name: "Again with this seed" }).click();
    await expect.poll(() => requests.length).toBe(2);
    expect(requests[0]?.seed).toBeUndefined();
    expect(requests[1]).toMatchObject({ prompt: "sunrise", seed: 42n, stepCount: 12 });
    expect(await page.getByLabel("Seed").inputValue()).toBe("42");
  });
});

describe("after a reload", () => {
  it("a picture goes on where it is, and a finished one is still there", async () => {
    const played = new Played();
    const { url } = await pretend(played.handlers);
    const page = await open(url);
    await develop(page, "sunrise over a calm sea");
    played.tell(preview(1), preview(2), preview(3));
    await says(page, "Step 3 of 8");
    await page.reload();
    await says(page, "sunrise over a calm sea");
    await says(page, "Step 3 of 8");
    await expect.poll(async () => (await recorded(page)).shown.at(-1)?.step).toBe(3);
    await shoot(page, "reloaded");
    played.tell(preview(4), final());
    await says(page, /^Finished/);
    await page.reload();
    await says(page, /^Finished/);
    await expect.poll(async () => (await recorded(page)).shown.at(-1)?.kind).toBe("final");
    expect(played.requests).toHaveLength(1);
    expect(played.requests[0]?.disconnectGrace?.seconds).toBe(30n);
    expect(played.cancelled).toEqual([]);
    await page.getByRole("button", { name: "Again with this seed" }).click();
    await expect.poll(() => played.requests[1]?.seed).toBe(42n);
  });

  it("a picture that the service then loses is begun again with the same seed", async () => {
    const played = new Played();
    const { url, stub } = await pretend(played.handlers);
    tolerate(/ERR_|Failed to load resource/);
    const page = await open(url);
    await develop(page, "sunrise", { Steps: 8 });
    played.tell(preview(1));
    await says(page, "Step 1 of 8");
    await page.reload();
    await says(page, "Step 1 of 8");
    played.forgotten = true;
    stub.cut();
    await expect.poll(() => played.requests[1]).toMatchObject({ prompt: "sunrise", seed: 42n, stepCount: 8 });
    played.forgotten = false;
    played.tell(preview(2), final());
    await says(page, /^Finished/);
    await page.reload();
    await says(page, /^Finished/);
  });

  it("what the service has forgotten, or what was cancelled or removed, is not there, without a word", async () => {
    const played = new Played();
    const { url } = await pretend(played.handlers);
    const page = await open(url);
    await develop(page, "sunrise");
    played.tell(preview(1));
    await says(page, "Step 1 of 8");
    played.forgotten = true;
    await page.reload();
    await expect.poll(async () => page.locator(".print").count()).toBe(0);
    await page.locator("#blank").waitFor();
    expect(await page.getByRole("alert").filter({ visible: true }).count()).toBe(0);
    played.forgotten = false;
    for (const button of ["Cancel", "Remove: sunrise"]) {
      await develop(page, "sunrise");
      await says(page, "Step 1 of 8");
      await page.getByRole("button", { name: button }).click();
      await expect.poll(() => played.cancelled.splice(0)).toEqual(["g"]);
      await page.reload();
      await page.locator("#develop:enabled").waitFor();
      expect(await page.locator(".print").count()).toBe(0);
    }
  });

  it("what still waited for a connection begins, and nothing begins twice", async () => {
    const begun = new Map<string, bigint | undefined>();
    const { url } = await pretend({
      async *generate({ requestId, seed = 0n }, context) {
        begun.set(requestId, seed);
        yield { ...preview(1), generationId: `g${seed}`, seed };
        await gone(context);
      },
      async *watch({ generationId }, context) {
        yield { ...preview(1), generationId, seed: BigInt(generationId.slice(1)) };
        await gone(context);
      },
    });
    const page = await open(url);
    await develop(page, "sunrise", { Seed: 1, Pictures: 6 });
    await expect.poll(async () => page.getByText("Step 1 of 8").count()).toBe(4);
    await page.reload();
    await expect.poll(async () => page.getByText("Step 1 of 8").count()).toBe(4);
    await expect.poll(async () => page.getByText("Waiting for a free connection").count()).toBe(2);
    expect([...begun.values()]).toEqual([1n, 2n, 3n, 4n]);
    await printOf(page, "Seed 1").getByRole("button", { name: "Remove" }).click();
    await expect.poll(() => [...begun.values()]).toEqual([1n, 2n, 3n, 4n, 5n]);
  });
});

describe("a second tab", () => {
  it("watches the same generation, and what either finds good enough is the picture of both", async () => {
    const played = new Played();
    const { url } = await pretend(played.handlers);
    const page = await open(url);
    await develop(page, "sunrise over a calm sea");
    played.tell(QUEUED);
    await says(page, /^Place 3/);
    expect(await page.getByRole("button", { name: "Good enough" }).count()).toBe(0);
    played.tell(preview(1), preview(2));
    await says(page, "Step 2 of 8");
    const opening = page.context().waitForEvent("page");
    await page.getByRole("link", { name: "Open on its own: sunrise over a calm sea" }).click();
    const other = await opening;
    await says(other, "sunrise over a calm sea");
    await says(other, "Step 2 of 8");
    played.tell(preview(5));
    await Promise.all([says(page, "Step 5 of 8"), says(other, "Step 5 of 8")]);
    await expectAccessible(other);
    await shoot(other, "second-tab");
    await other.getByRole("button", { name: "Good enough" }).press("Enter");
    const early = "Finished early, at step 5 of 8 · 64 × 48 PNG";
    await Promise.all([says(page, early), says(other, early)]);
    await shoot(page, "finished-early");
    const last = async (tab: Page) => (await recorded(tab)).shown.at(-1);
    for (const tab of [page, other]) await expect.poll(async () => (await last(tab))?.kind).toBe("final");
    expect(await last(page)).toEqual(await last(other));
    expect(played.requests).toHaveLength(1);
  });

  it("can be closed or emptied without an end for the first", async () => {
    const played = new Played();
    const { url } = await pretend(played.handlers);
    const page = await open(url);
    await develop(page, "sunrise");
    played.tell(preview(1));
    await says(page, "Step 1 of 8");
    const other = await page.context().newPage();
    await other.goto(`${url}/#watch=g`);
    await says(other, "Step 1 of 8");
    await other.getByRole("button", { name: "Remove" }).click();
    await other.close();
    played.tell(preview(2));
    await says(page, "Step 2 of 8");
    expect(played.cancelled).toEqual([]);
  });

  it("is told where there is no such picture", async () => {
    const { url } = await pretend(new Played().handlers);
    const page = await open(`${url}/#watch=nothing`);
    await says(page, "The service no longer knows this picture.");
    await expectAccessible(page);
  });
});

describe("when something goes wrong, the page", () => {
  it("reconnects by itself, calmly, keeps what there is, and goes on", async () => {
    const played = new Played();
    const { url, stub } = await pretend(played.handlers);
    tolerate(/ERR_|Failed to load resource/);
    const page = await open(url);
    await develop(page, "sunrise");
    played.tell(preview(1), preview(2));
    await says(page, "Step 2 of 8");
    await expect.poll(async () => (await recorded(page)).shown.length).toBe(2);
    played.away = true;
    stub.cut();
    await says(page, "Reconnecting; the picture goes on");
    expect(await page.locator("calotype-view img.layer").count()).toBeGreaterThan(0);
    expect(await page.getByRole("alert").filter({ visible: true }).count()).toBe(0);
    await expectAccessible(page);
    await shoot(page, "reconnecting");
    played.away = false;
    played.tell(preview(3), final());
    await says(page, /^Finished/);
    expect(played.requests).toHaveLength(1);
    expect(played.cancelled).toEqual([]);
    await expect.poll(async () => (await recorded(page)).shown.map(({ step }) => step)).toEqual([1, 2, 3, 8]);
  });

  it("can be cancelled while it reconnects", async () => {
    const played = new Played();
    const { url, stub } = await pretend(played.handlers);
    tolerate(/ERR_|Failed to load resource/);
    const page = await open(url);
    await develop(page, "sunrise");
    played.tell(preview(1));
    await says(page, "Step 1 of 8");
    played.away = true;
    stub.cut();
    await says(page, /^Reconnecting/);
    await page.getByRole("button", { name: "Cancel" }).click();
    await says(page, "Cancelled.");
    await expect.poll(() => played.cancelled).toEqual(["g"]);
  });

  it("goes on with the same seed, when asked to, where the service stopped twice", async () => {
    const seeds: (bigint | undefined)[] = [];
    const { url } = await pretend({
      async *generate({ seed }) {
        seeds.push(seed);
        yield preview(1);
        const error = { $typeName: "calotype.v1.Error", code: 14, reason: "DRAINING", message: "" } as const;
        if (seeds.length < 3) yield progress({ sequence: 3n, phase: Phase.FAILED, error });
        yield final();
      },
    });
    const page = await open(url);
    await develop(page, "sunrise");
    await says(page, "The service is shutting down.");
    await expectAccessible(page);
    await shoot(page, "lost");
    await page.getByRole("button", { name: "Go on" }).click();
    await says(page, "Finished");
    expect(seeds).toEqual([undefined, 42n, 42n]);
    expect(await page.getByRole("alert").filter({ visible: true }).count()).toBe(0);
  });

  it("names everything that the service refuses, in the words of the form", async () => {
    const { url } = await pretend({
      // biome-ignore lint/correctness/useYield: it is refused.
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
    const page = await open(url);
    await develop(page, "sunrise");
    await says(page, "The service cannot make this picture as asked.");
    const items = await page.getByRole("alert").getByRole("listitem").allTextContents();
    expect(items).toEqual(["Prompt has 101 characters, at most 100 are accepted", "Steps is 99, must be 1 to 50"]);
    expect(await page.getByText("raw text").count()).toBe(0);
    await shoot(page, "refused");
  });

  it("tells how long to wait when the queue is full, and tries again when asked", async () => {
    let calls = 0;
    const { url } = await pretend({
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
    const page = await open(url);
    await develop(page, "sunrise");
    await says(page, /queue is full/);
    await says(page, /wait 4\.0 s/);
    await page.getByRole("button", { name: "Try again" }).click();
    await says(page, "Finished");
  });

  it("waits for a service that is still loading", async () => {
    let calls = 0;
    const { url } = await pretend({
      getModel() {
        calls += 1;
        if (calls === 1)
          throw new ConnectError("", Code.Unavailable, undefined, [
            { desc: ErrorInfoSchema, value: { reason: "NOT_READY" } },
          ]);
        return MODEL;
      },
    });
    const page = await open(url);
    await page.getByText("The model is still loading.").waitFor();
    expect(await page.getByRole("button", { name: "Develop" }).isDisabled()).toBe(true);
    await page.locator("#develop:enabled").waitFor();
    expect(await page.getByRole("alert").filter({ visible: true }).count()).toBe(0);
  });

  it("cancels from the keyboard, and hands the focus on", async () => {
    const left = new Gate();
    const { url } = await pretend({
      async *generate(_request, context) {
        yield preview(1);
        await gone(context);
        left.open();
      },
    });
    const page = await open(url);
    await develop(page, "sunrise");
    await says(page, "Step 1 of 8");
    await page.getByRole("button", { name: "Cancel" }).press("Enter");
    await left.opened;
    await says(page, "Cancelled.");
    expect(await page.evaluate(() => document.activeElement?.shadowRoot?.activeElement?.textContent)).toBe("Try again");
  });
});

describe("the form", () => {
  it("offers what the model can do, and nothing else", async () => {
    const { url } = await pretend({});
    const page = await open(url);
    await page.locator("#develop:enabled").waitFor();
    await page.getByText("More").click();
    await expectAccessible(page);
    const value = (label: string) => page.getByLabel(new RegExp(`^${label}`)).inputValue();
    expect(await Promise.all(["Width", "Height", "Steps", "Guidance", "Scheduler"].map(value))).toEqual([
      "64",
      "48",
      "8",
      "7.5",
      "DDIMScheduler",
    ]);
    expect(await page.getByLabel("Steps", { exact: true }).getAttribute("max")).toBe("50");
    expect(await page.getByLabel("Preview drawn by").locator("option").allTextContents()).toEqual([
      "whatever is best",
      "a quick sketch",
      "the model itself",
      "no previews",
    ]);
    await page.getByLabel("Width").fill("128");
    expect(
      await page.locator("input[name=height]").evaluate((input: HTMLInputElement) => input.validity.customError),
    ).toBe(false);
    await page.getByLabel("Height").fill("512");
    expect(
      await page.locator("input[name=height]").evaluate((input: HTMLInputElement) => input.validity.customError),
    ).toBe(true);
    await shoot(page, "form");
  });

  it("hides what the model has no use for, and sends none of it", async () => {
    let request: object | undefined;
    const { url } = await pretend({
      getModel: () => ({ ...MODEL, guidanceScale: undefined, takesNegativePrompt: false, preview: undefined }),
      async *generate(given) {
        request = given;
        yield final();
      },
    });
    const page = await open(url);
    await develop(page, "sunrise");
    await says(page, "Finished");
    for (const label of ["Guidance", "What to avoid", "Preview size"])
      expect(await page.getByLabel(label).isVisible()).toBe(false);
    for (const field of ["guidanceScale", "negativePrompt", "preview"]) expect(request).not.toHaveProperty(field);
  });

  it("sends what was chosen", async () => {
    let request: object | undefined;
    const { url } = await pretend({
      async *generate(given) {
        request = given;
        yield final();
      },
    });
    const page = await open(url);
    await page.locator("#develop:enabled").waitFor();
    await page.getByText("More").click();
    await page.getByLabel("What to avoid").fill("clouds");
    await page.getByLabel("Scheduler").selectOption("EulerDiscreteScheduler");
    await page.getByLabel("Preview every … steps").fill("2");
    await page.getByLabel("Preview drawn by").selectOption("the model itself");
    await page.getByLabel("Prompt").fill("sunrise");
    await page.getByLabel("Prompt").press("Enter");
    await says(page, "Finished");
    expect(request).toMatchObject({
      negativePrompt: "clouds",
      scheduler: "EulerDiscreteScheduler",
      preview: { everySteps: 2, method: PreviewMethod.FULL_VAE },
    });
  });
});

describe("<calotype-view> by itself", () => {
  const ADD = `
    const view = document.createElement("calotype-view");
    for (const [name, value] of Object.entries({ prompt: "sunrise", seed: "9", steps: "8", "preview-every-steps": "2", autostart: "" }))
      view.setAttribute(name, value);
    document.querySelector("main").append(view);
  `;

  it("starts by itself, says what its attributes say, tells how it ended, and outlives a move", async () => {
    const [end, requests] = [new Gate(), [] as object[]];
    const { url } = await pretend({
      async *generate(request) {
        requests.push(request);
        yield preview(1);
        await end.opened;
        yield final();
      },
    });
    const page = await open(url);
    const ended = page.evaluate(
      "new Promise((resolve) => addEventListener('calotype-end', ({ detail }) => resolve(detail.status), { once: true }))",
    );
    await page.evaluate(ADD);
    await expect.poll(async () => (await recorded(page)).shown.length).toBe(1);
    await page.evaluate("document.querySelector('main').prepend(document.querySelector('main > calotype-view'))");
    end.open();
    expect(await ended).toBe("succeeded");
    expect(requests).toHaveLength(1);
    expect(requests[0]).toMatchObject({ prompt: "sunrise", seed: 9n, stepCount: 8, preview: { everySteps: 2 } });
  });

  it("leaves its generation when it is removed, and shows what it has when it comes back", async () => {
    const left = new Gate();
    const { url } = await pretend({
      async *generate(_request, context) {
        yield preview(1);
        yield preview(2);
        await gone(context);
        left.open();
      },
    });
    const page = await open(url);
    await page.evaluate(ADD);
    await expect.poll(async () => (await recorded(page)).shown.at(-1)?.step).toBe(2);
    await page.evaluate("window.view = document.querySelector('main > calotype-view'); view.remove()");
    await left.opened;
    const { urls, shown } = await recorded(page);
    expect(urls.released).toBe(urls.made);
    await page.evaluate("document.querySelector('main').append(view)");
    await expect.poll(async () => (await recorded(page)).shown.length).toBe(shown.length + 1);
    const broken =
      "[...view.shadowRoot.querySelectorAll('img')].filter(({ complete, naturalWidth }) => complete && !naturalWidth).length";
    expect(await page.evaluate(broken)).toBe(0);
  });
});

describe("on a phone", () => {
  it.each(["light", "dark"] as const)("nothing is cut off (%s)", async (colorScheme) => {
    const { url } = await pretend({
      async *generate() {
        yield* steps();
        yield final();
      },
    });
    const page = await open(url, { viewport: { width: 360, height: 740 }, colorScheme, hasTouch: true });
    await develop(page, "sunrise over a calm sea, averyveryverylongwordthatcannotbebrokenanywhereatall", {
      Pictures: 2,
    });
    await expect.poll(async () => page.getByText(/^Finished/).count()).toBe(2);
    expect(await page.evaluate(() => document.documentElement.scrollWidth)).toBeLessThanOrEqual(360);
    await expectAccessible(page);
    await shoot(page, `phone-${colorScheme}`);
  });
});
