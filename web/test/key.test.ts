import { describe, expect, it } from "vitest";
import { develop, expectAccessible, openPage, screenshot, waitForText } from "./support/browser.js";
import {
  Code,
  ConnectError,
  ErrorInfoSchema,
  final,
  type HandlerContext,
  MODEL,
  serveScripted,
} from "./support/scripted_service.js";

const KEY = "calotype_alice_0123456789";

/** Rejects calls without the key, like the service. */
function check({ requestHeader }: HandlerContext): void {
  const given = requestHeader.get("authorization");
  if (given === `Bearer ${KEY}`) return;
  const info = { desc: ErrorInfoSchema, value: { reason: given ? "KEY_INVALID" : "KEY_REQUIRED", domain: "calotype" } };
  throw new ConnectError("no key", Code.Unauthenticated, undefined, [info]);
}

/** Handlers that require the key. */
const protectedHandlers = {
  getModel(_: unknown, context: HandlerContext) {
    check(context);
    return MODEL;
  },
  async *generate(_: unknown, context: HandlerContext) {
    check(context);
    yield final();
  },
};

describe("a service that requires an API key", () => {
  it("accepts a key entered with the keyboard; the page keeps it in this tab only, and out of the URL", async () => {
    const { url } = await serveScripted(protectedHandlers);
    const page = await openPage(url);
    await page.getByText("This service requires an API key.").waitFor();
    await expectAccessible(page);
    await screenshot(page, "key");
    const focused = () => page.evaluate(() => document.activeElement?.closest("form")?.id);
    expect(await focused()).toBe("key");

    await page.keyboard.type("calotype_mallory_1");
    await page.keyboard.press("Enter");
    await page.getByText("The service does not accept this API key.").waitFor();
    expect(await focused()).toBe("key");

    await page.keyboard.type(` ${KEY} `);
    await page.keyboard.press("Enter");
    await page.locator("#develop:enabled").waitFor();
    expect(await page.locator("#key").isVisible()).toBe(false);
    expect(await page.locator("#problem").isVisible()).toBe(false);
    expect(await focused()).toBe("composer");
    await develop(page, "a cat");
    await waitForText(page, "Finished");

    expect(page.url()).not.toContain("calotype_");
    expect(await page.evaluate(() => JSON.stringify({ ...localStorage, cookie: document.cookie }))).not.toContain(KEY);
    await page.reload();
    await page.locator("#develop:enabled").waitFor();
    expect(await page.locator("#key").isVisible()).toBe(false);
  });

  it("asks again if the key is revoked while the page is open", async () => {
    let isRevoked = false;
    const revocable = {
      getModel: (request: unknown, context: HandlerContext) => {
        if (isRevoked) context.requestHeader.set("authorization", "Bearer none");
        return protectedHandlers.getModel(request, context);
      },
      generate: (request: unknown, context: HandlerContext) => {
        if (isRevoked) context.requestHeader.set("authorization", "Bearer none");
        return protectedHandlers.generate(request, context);
      },
    };
    const { url } = await serveScripted(revocable);
    const page = await openPage(url);
    await page.getByLabel("API key").fill(KEY);
    await page.keyboard.press("Enter");
    await page.locator("#develop:enabled").waitFor();
    isRevoked = true;
    await develop(page, "a cat");
    await page.getByLabel("API key").waitFor();
    isRevoked = false;
    await page.getByLabel("API key").fill(KEY);
    await page.keyboard.press("Enter");
    await page.locator("#key").waitFor({ state: "hidden" });
  });
});
