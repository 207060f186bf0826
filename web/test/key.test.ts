import { describe, expect, it } from "vitest";
import { develop, expectAccessible, open, says, shoot } from "./browser.js";
import { Code, ConnectError, ErrorInfoSchema, final, type HandlerContext, MODEL, pretend } from "./scripted_service.js";

const KEY = "calotype_alice_0123456789";

/** Refuses calls without the key, as the service does. */
function check({ requestHeader }: HandlerContext): void {
  const given = requestHeader.get("authorization");
  if (given === `Bearer ${KEY}`) return;
  const info = { desc: ErrorInfoSchema, value: { reason: given ? "KEY_INVALID" : "KEY_REQUIRED", domain: "calotype" } };
  throw new ConnectError("no key", Code.Unauthenticated, undefined, [info]);
}

/** A service that asks for a key, which a test may change. */
const closed = {
  getModel(_: unknown, context: HandlerContext) {
    check(context);
    return MODEL;
  },
  async *generate(_: unknown, context: HandlerContext) {
    check(context);
    yield final();
  },
};

describe("a service that asks for a key", () => {
  it("is opened with the keyboard alone, remembers the key for this tab only, and keeps it out of the address", async () => {
    const { url } = await pretend(closed);
    const page = await open(url);
    await page.getByText("This service asks for a key.").waitFor();
    await expectAccessible(page);
    await shoot(page, "key");
    const focused = () => page.evaluate(() => document.activeElement?.closest("form")?.id);
    expect(await focused()).toBe("key");

    await page.keyboard.type("calotype_mallory_1");
    await page.keyboard.press("Enter");
    await page.getByText("The service does not know this key.").waitFor();
    expect(await focused()).toBe("key");

    await page.keyboard.type(` ${KEY} `);
    await page.keyboard.press("Enter");
    await page.locator("#develop:enabled").waitFor();
    expect(await page.locator("#key").isVisible()).toBe(false);
    expect(await page.locator("#trouble").isVisible()).toBe(false);
    expect(await focused()).toBe("composer");
    await develop(page, "a cat");
    await says(page, "Finished");

    expect(page.url()).not.toContain("calotype_");
    expect(await page.evaluate(() => JSON.stringify({ ...localStorage, cookie: document.cookie }))).not.toContain(KEY);
    await page.reload();
    await page.locator("#develop:enabled").waitFor();
    expect(await page.locator("#key").isVisible()).toBe(false);
  });

  it("asks again when the key is withdrawn while the page is open", async () => {
    let isWithdrawn = false;
    const withdrawing = {
      getModel: (request: unknown, context: HandlerContext) => {
        if (isWithdrawn) context.requestHeader.set("authorization", "Bearer none");
        return closed.getModel(request, context);
      },
      generate: (request: unknown, context: HandlerContext) => {
        if (isWithdrawn) context.requestHeader.set("authorization", "Bearer none");
        return closed.generate(request, context);
      },
    };
    const { url } = await pretend(withdrawing);
    const page = await open(url);
    await page.getByLabel("API key").fill(KEY);
    await page.keyboard.press("Enter");
    await page.locator("#develop:enabled").waitFor();
    isWithdrawn = true;
    await develop(page, "a cat");
    await page.getByLabel("API key").waitFor();
    isWithdrawn = false;
    await page.getByLabel("API key").fill(KEY);
    await page.keyboard.press("Enter");
    await page.locator("#key").waitFor({ state: "hidden" });
  });
});
