import { describe, expect, it } from "vitest";
import {
  develop,
  expectAccessible,
  openPage,
  printWithText,
  recorded,
  screenshot,
  waitForText,
} from "./support/browser.js";
import { disconnected, final, Gate, Phase, preview, progress, serveScripted } from "./support/scripted_service.js";

const QUEUED = progress({
  sequence: 1n,
  phase: Phase.QUEUED,
  queuePosition: 3,
  totalSteps: 0,
  estimatedRemaining: { $typeName: "google.protobuf.Duration", seconds: 12n, nanos: 0 },
});

async function* steps(until = 8) {
  for (let step = 1; step <= until; step += 1) yield preview(step);
}

describe("a picture that develops", () => {
  it("shows the queue, the steps and the end, and is accessible in each phase", async () => {
    const [start, half, end] = [new Gate(), new Gate(), new Gate()];
    const { url } = await serveScripted({
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
    const page = await openPage(url);
    await develop(page, "sunrise over a calm sea");
    await waitForText(page, "Position 3 in the queue · about 12 s left");
    await expectAccessible(page);
    await screenshot(page, "queued");
    start.open();
    await waitForText(page, "Step 4 of 8");
    expect(await page.getByRole("progressbar").getAttribute("aria-valuenow")).toBe("44");
    await expectAccessible(page);
    half.open();
    await waitForText(page, "Step 5 of 8");
    end.open();
    await waitForText(page, "Finished · 64 × 48 PNG");
    await expectAccessible(page);
    const { shown, percents } = await recorded(page);
    const order = shown.map(({ step }) => step);
    expect(order).toEqual([...new Set(order)].sort((a, b) => a - b));
    expect([order[0], order.at(-1)]).toEqual([1, 8]);
    expect(percents).toEqual([...percents].sort((a, b) => a - b));
    expect(percents.at(-1)).toBe(100);
  });

  it("can be browsed with the keyboard", async () => {
    const { url } = await serveScripted({
      async *generate() {
        yield* steps();
        yield final();
      },
    });
    const page = await openPage(url);
    await develop(page, "sunrise");
    await waitForText(page, "Finished");
    const slider = page.getByRole("slider");
    await slider.focus();
    await page.keyboard.press("Home");
    await waitForText(page, "Estimate at step 1 of 8");
    expect(await slider.getAttribute("aria-valuetext")).toBe("Estimate at step 1 of 8");
    await page.keyboard.press("ArrowRight");
    await waitForText(page, "Estimate at step 2 of 8");
    await expect.poll(async () => (await recorded(page)).shown.at(-1)?.step).toBe(2);
    expect(await page.getByRole("img", { name: "sunrise. Estimate at step 2 of 8" }).count()).toBe(1);
    await page.keyboard.press("End");
    await waitForText(page, "Finished");
  });

  it("is removed, and its memory released, if its previews are withdrawn", async () => {
    const withdraw = new Gate();
    const { url } = await serveScripted({
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
    const page = await openPage(url);
    await develop(page, "x");
    await waitForText(page, "Step 3 of 8");
    await expect.poll(async () => (await recorded(page)).shown.length).toBe(3);
    withdraw.open();
    await waitForText(page, "This picture is withheld.");
    expect(await page.locator("calotype-view img").count()).toBe(0);
    const { urls } = await recorded(page);
    expect(urls.released).toBe(urls.created);
    expect(await page.getByRole("slider").count()).toBe(0);
  });

  it("keeps nothing in memory after it is removed", async () => {
    const { url } = await serveScripted({
      async *generate() {
        yield* steps();
        yield final();
      },
    });
    const page = await openPage(url);
    await develop(page, "sunrise");
    await waitForText(page, "Finished");
    await page.getByRole("button", { name: "Remove: sunrise" }).click();
    await expect.poll(async () => page.locator(".print").count()).toBe(0);
    const { urls } = await recorded(page);
    expect(urls.created).toBeGreaterThan(0);
    expect(urls.released).toBe(urls.created);
    expect(await page.evaluate(() => document.activeElement?.id)).toBe("prompt");
  });

  it("animates only the opacity, and nothing with reduced motion", async () => {
    const last = new Gate();
    const { url } = await serveScripted({
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
      const page = await openPage(url, { reducedMotion });
      await page.evaluate(spy);
      await develop(page, "sunrise");
      await waitForText(page, reducedMotion === "reduce" ? "Finished" : "Step 2 of 8");
      last.open();
      await expect.poll(async () => (await recorded(page)).shown.at(-1)?.kind).toBe("final");
      const animated = await page.evaluate<string[][]>("animated");
      if (reducedMotion === "reduce") expect(animated).toEqual([]);
      else expect(new Set(animated.flat())).toEqual(new Set(["opacity"]));
    }
  });

  it("is not rendered while the page is hidden, and then shows the newest preview", async () => {
    const [rest, end] = [new Gate(), new Gate()];
    const { url } = await serveScripted({
      async *generate() {
        yield preview(1);
        await rest.opened;
        for (const step of [2, 3, 4, 5, 6]) yield preview(step);
        await end.opened;
        yield final();
      },
    });
    const page = await openPage(url);
    await develop(page, "sunrise");
    await expect.poll(async () => (await recorded(page)).shown.length).toBe(1);
    await page.evaluate("Object.defineProperty(document, 'hidden', { value: true, configurable: true })");
    rest.open();
    await waitForText(page, "Step 6 of 8");
    expect((await recorded(page)).shown).toHaveLength(1);
    await page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))");
    await expect.poll(async () => (await recorded(page)).shown.at(-1)?.step).toBe(6);
    end.open();
    await waitForText(page, /^Finished/);
  });
});

describe("several pictures", () => {
  it("run four at a time, which leaves connections for other calls", async () => {
    const finish = new Gate();
    let running = 0;
    let maxRunning = 0;
    const cancelled: string[] = [];
    const { url } = await serveScripted({
      async *generate({ seed }, context) {
        running += 1;
        maxRunning = Math.max(maxRunning, running);
        try {
          yield progress({ sequence: 1n, phase: Phase.DENOISING, seed: seed ?? 0n });
          await Promise.race([finish.opened, disconnected(context)]);
          if (context.signal.aborted) cancelled.push(String(seed));
          yield final();
        } finally {
          running -= 1;
        }
      },
    });
    const page = await openPage(url);
    await develop(page, "sunrise", { Seed: 10, Pictures: 7 });
    await expect.poll(() => running).toBe(4);
    await expect.poll(async () => page.getByText("Waiting for a free connection").count()).toBe(3);
    // A request that is not a stream still gets a connection.
    const status = await page.evaluate(async () => (await fetch("favicon.svg")).status);
    expect(status).toBe(200);
    await screenshot(page, "side-by-side");
    expect(maxRunning).toBe(4);
    await printWithText(page, "Seed 10").getByRole("button", { name: "Cancel" }).click();
    await expect.poll(() => cancelled).toEqual(["10"]);
    await expect.poll(async () => page.getByText("Waiting for a free connection").count()).toBe(2);
    finish.open();
    await expect.poll(async () => page.getByText(/^Finished/).count()).toBe(6);
  });

  it("share the connections with other tabs, which can still make calls", async () => {
    const [finish, running] = [new Gate(), new Set<string>()];
    let cancelled = 0;
    const { url } = await serveScripted({
      async *generate({ requestId, seed = 0n }, context) {
        running.add(requestId);
        yield { ...preview(1), generationId: requestId, seed };
        await Promise.race([finish.opened, disconnected(context)]);
        yield final();
      },
      cancel() {
        cancelled += 1;
        return {};
      },
    });
    const page = await openPage(url);
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
    // A closed tab frees its connections.
    await page.close();
    await expect.poll(() => running.size).toBe(6);
    finish.open();
    await expect.poll(async () => other.getByText(/^Finished/).count()).toBe(3);
  });

  it("get consecutive seeds", async () => {
    const seeds: bigint[] = [];
    const { url } = await serveScripted({
      async *generate({ seed }) {
        seeds.push(seed ?? -1n);
        yield final();
      },
    });
    const page = await openPage(url);
    await develop(page, "sunrise", { Seed: 5, Pictures: 3 });
    await expect.poll(() => [...seeds].sort()).toEqual([5n, 6n, 7n]);
  });

  it("can be repeated with the same seed and settings", async () => {
    const requests: { prompt: string; seed?: bigint; stepCount?: number }[] = [];
    const { url } = await serveScripted({
      async *generate(request) {
        requests.push(request);
        yield final();
      },
    });
    const page = await openPage(url);
    await develop(page, "sunrise", { Steps: 12 });
    await page.getByRole("button", { name: "Repeat with this seed" }).click();
    await expect.poll(() => requests.length).toBe(2);
    expect(requests[0]?.seed).toBeUndefined();
    expect(requests[1]).toMatchObject({ prompt: "sunrise", seed: 42n, stepCount: 12 });
    expect(await page.getByLabel("Seed").inputValue()).toBe("42");
  });
});
