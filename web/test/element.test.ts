import { Speed } from "calotype/wire";
import { describe, expect, it } from "vitest";
import { openPage, recorded } from "./support/browser.js";
import { disconnected, final, Gate, preview, serveScripted } from "./support/scripted_service.js";

describe("<calotype-view> without the page", () => {
  const ADD = `
    const view = document.createElement("calotype-view");
    for (const [name, value] of Object.entries({ prompt: "sunrise", seed: "9", steps: "8", speed: "fast", "preview-every-steps": "2", autostart: "" }))
      view.setAttribute(name, value);
    document.querySelector("main").append(view);
  `;

  it("starts automatically with its attributes, reports its end, and survives a move in the document", async () => {
    const [end, requests] = [new Gate(), [] as object[]];
    const { url } = await serveScripted({
      async *generate(request) {
        requests.push(request);
        yield preview(1);
        await end.opened;
        yield final();
      },
    });
    const page = await openPage(url);
    const ended = page.evaluate(
      "new Promise((resolve) => addEventListener('calotype-end', ({ detail }) => resolve(detail.status), { once: true }))",
    );
    await page.evaluate(ADD);
    await expect.poll(async () => (await recorded(page)).shown.length).toBe(1);
    await page.evaluate("document.querySelector('main').prepend(document.querySelector('main > calotype-view'))");
    end.open();
    expect(await ended).toBe("succeeded");
    expect(requests).toHaveLength(1);
    expect(requests[0]).toMatchObject({ prompt: "sunrise", seed: 9n, stepCount: 8, speed: Speed.FAST });
    expect(requests[0]).toMatchObject({ preview: { everySteps: 2 } });
  });

  it("leaves its generation when it is removed, and shows its pictures when it is added again", async () => {
    const left = new Gate();
    const { url } = await serveScripted({
      async *generate(_request, context) {
        yield preview(1);
        yield preview(2);
        await disconnected(context);
        left.open();
      },
    });
    const page = await openPage(url);
    await page.evaluate(ADD);
    await expect.poll(async () => (await recorded(page)).shown.at(-1)?.step).toBe(2);
    await page.evaluate("window.view = document.querySelector('main > calotype-view'); view.remove()");
    await left.opened;
    const { urls, shown } = await recorded(page);
    expect(urls.released).toBe(urls.created);
    await page.evaluate("document.querySelector('main').append(view)");
    await expect.poll(async () => (await recorded(page)).shown.length).toBe(shown.length + 1);
    const broken =
      "[...view.shadowRoot.querySelectorAll('img')].filter(({ complete, naturalWidth }) => complete && !naturalWidth).length";
    expect(await page.evaluate(broken)).toBe(0);
  });
});
