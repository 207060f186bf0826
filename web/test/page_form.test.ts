import { describe, expect, it } from "vitest";
import { develop, expectAccessible, openPage, screenshot, waitForText } from "./support/browser.js";
import { final, MODEL, PreviewMethod, preview, serveScripted } from "./support/scripted_service.js";

async function* steps(until = 8) {
  for (let step = 1; step <= until; step += 1) yield preview(step);
}

describe("the form", () => {
  it("offers the options of the model and no others", async () => {
    const { url } = await serveScripted({});
    const page = await openPage(url);
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
    expect(await page.getByLabel("Preview method").locator("option").allTextContents()).toEqual([
      "automatic",
      "fast sketch",
      "full decoder",
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
    await screenshot(page, "form");
  });

  it("hides options that the model does not support, and does not send them", async () => {
    let request: object | undefined;
    const { url } = await serveScripted({
      getModel: () => ({ ...MODEL, guidanceScale: undefined, takesNegativePrompt: false, preview: undefined }),
      async *generate(received) {
        request = received;
        yield final();
      },
    });
    const page = await openPage(url);
    await develop(page, "sunrise");
    await waitForText(page, "Finished");
    for (const label of ["Guidance", "Negative prompt", "Preview size"])
      expect(await page.getByLabel(label).isVisible()).toBe(false);
    for (const field of ["guidanceScale", "negativePrompt", "preview"]) expect(request).not.toHaveProperty(field);
  });

  it("sends the chosen options", async () => {
    let request: object | undefined;
    const { url } = await serveScripted({
      async *generate(received) {
        request = received;
        yield final();
      },
    });
    const page = await openPage(url);
    await page.locator("#develop:enabled").waitFor();
    await page.getByText("More").click();
    await page.getByLabel("Negative prompt").fill("clouds");
    await page.getByLabel("Scheduler").selectOption("EulerDiscreteScheduler");
    await page.getByLabel("Preview every … steps").fill("2");
    await page.getByLabel("Preview method").selectOption("full decoder");
    await page.getByLabel(/^Prompt/).fill("sunrise");
    await page.getByLabel(/^Prompt/).press("Enter");
    await waitForText(page, "Finished");
    expect(request).toMatchObject({
      negativePrompt: "clouds",
      scheduler: "EulerDiscreteScheduler",
      preview: { everySteps: 2, method: PreviewMethod.FULL_VAE },
    });
  });
});

describe("on a phone", () => {
  it.each(["light", "dark"] as const)("nothing is cut off (%s)", async (colorScheme) => {
    const { url } = await serveScripted({
      async *generate() {
        yield* steps();
        yield final();
      },
    });
    const page = await openPage(url, { viewport: { width: 360, height: 740 }, colorScheme, hasTouch: true });
    await develop(page, "sunrise over a calm sea, averyveryverylongwordthatcannotbebrokenanywhereatall", {
      Pictures: 2,
    });
    await expect.poll(async () => page.getByText(/^Finished/).count()).toBe(2);
    expect(await page.evaluate(() => document.documentElement.scrollWidth)).toBeLessThanOrEqual(360);
    await expectAccessible(page);
    await screenshot(page, `phone-${colorScheme}`);
  });
});
