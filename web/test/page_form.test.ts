import { describe, expect, it } from "vitest";
import { develop, expectAccessible, openPage, screenshot, waitForText } from "./support/browser.js";
import {
  create,
  final,
  type GenerateRequest,
  MODEL,
  ModelSchema,
  PreviewMethod,
  PromptSyntax,
  preview,
  serveScripted,
  WarningSchema,
} from "./support/scripted_service.js";

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

describe("the options of a model with LoRAs and fixed sizes", () => {
  const { $typeName: _, ...base } = MODEL;
  const model = create(ModelSchema, {
    ...base,
    loras: [{ name: "pixel art" }, { name: "sharp, soft" }],
    sizes: [
      { widthPx: 64, heightPx: 48 },
      { widthPx: 96, heightPx: 32 },
    ],
    minPixels: 1024,
    maxAspectRatio: 4,
    promptSyntaxes: [PromptSyntax.PLAIN, PromptSyntax.WEIGHTED],
    schedulerDetails: [
      { name: "DDIMScheduler", aliases: ["DDIM"] },
      { name: "EulerDiscreteScheduler", aliases: ["Euler", "Euler Karras"] },
    ],
  });

  it("are offered, sent, and shown with their warnings", async () => {
    const requests: GenerateRequest[] = [];
    const warning = { reason: "LORA_TAG_IGNORED", message: "The tag <lora:x:1> has no effect." };
    const warnings = [create(WarningSchema, warning)];
    const { url } = await serveScripted({
      getModel: () => model,
      async *generate(received) {
        requests.push(received);
        yield { ...final(), warnings };
      },
    });
    const page = await openPage(url);
    await page.locator("#develop:enabled").waitFor();
    await page.getByText("More").click();
    await expectAccessible(page);
    expect(await page.getByLabel(/^Size/).locator("option").allTextContents()).toEqual(["64 × 48", "96 × 32", "other"]);
    await page.getByLabel(/^Size/).selectOption("96 × 32");
    await page.getByLabel("pixel art").fill("0.8");
    await page.getByLabel("sharp, soft").fill("-1");
    await page.getByLabel(/^Weights/).check();
    const scheduler = page.getByLabel("Scheduler");
    expect(await scheduler.locator("option").allTextContents()).toEqual([
      "DDIM",
      "EulerDiscrete",
      "Euler",
      "Euler Karras",
    ]);
    await scheduler.selectOption("Euler Karras");
    await screenshot(page, "form-loras");
    await page.getByLabel(/^Prompt:/).fill("sunrise");
    await page.getByLabel(/^Prompt:/).press("Enter");
    await waitForText(page, "The tag <lora:x:1> has no effect.");
    await page.getByText("Repeat with this seed").click();
    await expect.poll(() => requests.length).toBe(2);
    for (const request of requests)
      expect(request).toMatchObject({
        widthPx: 96,
        heightPx: 32,
        scheduler: "Euler Karras",
        promptSyntax: PromptSyntax.WEIGHTED,
        loras: [
          { name: "pixel art", scale: Math.fround(0.8) },
          { name: "sharp, soft", scale: -1 },
        ],
      });
  });

  it("accept any size above the minimum, or only the offered ones", async () => {
    const { url } = await serveScripted({ getModel: () => model });
    const page = await openPage(url);
    await page.locator("#develop:enabled").waitFor();
    await page.getByLabel("Width").fill("16");
    expect(await page.getByLabel(/^Size/).inputValue()).toBe("other");
    const height = page.locator("input[name=height]");
    expect(await height.evaluate((input: HTMLInputElement) => input.validationMessage)).toContain("at least 1,024");

    await page.getByLabel("Width").fill("96");
    await height.fill("16");
    expect(await height.evaluate((input: HTMLInputElement) => input.validationMessage)).toContain("at most 4 times");
    await height.fill("24");
    expect(await height.evaluate((input: HTMLInputElement) => input.validationMessage)).toBe("");

    const fixed = await serveScripted({ getModel: () => ({ ...model, minPixels: 0 }) });
    const other = await openPage(fixed.url);
    await other.locator("#develop:enabled").waitFor();
    expect(await other.getByLabel(/^Size/).locator("option").count()).toBe(2);
    for (const label of ["Width", "Height"]) expect(await other.getByLabel(label).isVisible()).toBe(false);
  });

  it("accept any size if the service scales pictures", async () => {
    const { url } = await serveScripted({ getModel: () => ({ ...model, scalesOtherSizes: true }) });
    const page = await openPage(url);
    await page.locator("#develop:enabled").waitFor();
    await page.getByLabel("Width").fill("1920");
    await page.getByLabel("Height").fill("1081");
    expect(
      await page
        .locator("form")
        .first()
        .evaluate((form: HTMLFormElement) => form.checkValidity()),
    ).toBe(false);
    await page.getByLabel(/^Prompt:/).fill("sunrise");
    expect(
      await page
        .locator("form")
        .first()
        .evaluate((form: HTMLFormElement) => form.checkValidity()),
    ).toBe(true);
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
