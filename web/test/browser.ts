/** Debian's Chromium, headless, and what every test of the page looks at. */

import { existsSync } from "node:fs";
import { mkdir } from "node:fs/promises";
import { AxeBuilder } from "@axe-core/playwright";
import { type Browser, type BrowserContextOptions, chromium, type Locator, type Page } from "playwright-core";
import { afterAll, afterEach, beforeAll, expect } from "vitest";

const CHROMIUM = process.env.CHROMIUM ?? ["/usr/bin/chromium", "/usr/bin/google-chrome"].find(existsSync);

const FLAGS = [
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];

const SHOTS = new URL("../../build/page/", import.meta.url).pathname;

let browser: Browser;
const problems: string[] = [];
/** What a test expects the console to complain about. */
let tolerated: RegExp | undefined;

beforeAll(async () => {
  if (!CHROMIUM)
    throw new Error("Chromium is missing; on Debian: apt-get install chromium. Elsewhere: CHROMIUM=/path/to/it");
  browser = await chromium.launch({ executablePath: CHROMIUM, headless: true, args: FLAGS });
  await mkdir(SHOTS, { recursive: true });
});

afterEach(async () => {
  await Promise.all(browser.contexts().map((context) => context.close()));
  const unexpected = problems.splice(0).filter((text) => !tolerated?.test(text));
  tolerated = undefined;
  expect(unexpected).toEqual([]);
});

afterAll(() => browser?.close());

/** Lets the console of this test say what matches; everything else that it says fails the test. */
export function tolerate(pattern: RegExp): void {
  tolerated = pattern;
}

/** Opens the page in a context of its own. Every complaint of its console, such as of the CSP, fails the test. */
export async function open(url: string, options: BrowserContextOptions = {}): Promise<Page> {
  const context = await browser.newContext({ viewport: { width: 1200, height: 900 }, ...options });
  await context.addInitScript(RECORDER);
  // A busy machine is no reason to fail.
  context.setDefaultTimeout(60_000);
  context.on("page", listen);
  const page = await context.newPage();
  await page.goto(url);
  return page;
}

function listen(page: Page): void {
  page.on("pageerror", (error) => problems.push(String(error)));
  page.on("console", (message) => {
    if (["error", "warning"].includes(message.type())) problems.push(message.text());
  });
}

/** The print that shows this text. */
export function printOf(page: Page, text: string): Locator {
  return page.locator(".print").filter({ has: page.getByText(text, { exact: true }) });
}

export interface Recorded {
  /** Every picture that was put on the screen, over all prints. */
  readonly shown: { step: number; kind: string; size: number; fingerprint: number }[];
  readonly percents: number[];
  readonly urls: { made: number; released: number };
}

/** Notes in the page what its elements report, and counts object URLs. */
const RECORDER = `
  window.recorded = { shown: [], percents: [], urls: { made: 0, released: 0 } };
  addEventListener("calotype-picture", ({ detail }) => {
    const fingerprint = detail.data.reduce((hash, byte) => (hash * 31 + byte) >>> 0, 7);
    recorded.shown.push({ step: detail.step, kind: detail.kind, size: detail.data.length, fingerprint });
  });
  addEventListener("calotype-state", ({ target }) => {
    const bar = target.shadowRoot.querySelector("[role=progressbar]");
    recorded.percents.push(Number(bar.getAttribute("aria-valuenow")));
  });
  for (const [name, count] of [["createObjectURL", "made"], ["revokeObjectURL", "released"]]) {
    const original = URL[name];
    URL[name] = (value) => { recorded.urls[count] += 1; return original.call(URL, value); };
  }
`;

export async function recorded(page: Page): Promise<Recorded> {
  return page.evaluate<Recorded>("window.recorded");
}

/** Waits until the page has finished as many pictures, and returns their fingerprints. */
export async function finals(page: Page, count: number): Promise<number[]> {
  const shown = async () => (await recorded(page)).shown.filter(({ kind }) => kind === "final");
  await expect.poll(async () => page.getByText(/^Finished/).count(), { timeout: 120_000 }).toBe(count);
  await expect.poll(async () => (await shown()).length).toBe(count);
  return (await shown()).map((each) => each.fingerprint);
}

/** Types a prompt and develops it. */
export async function develop(
  page: Page,
  prompt: string,
  settings: Record<string, string | number> = {},
): Promise<void> {
  await page.locator("#develop:enabled").waitFor();
  await page.getByLabel("Prompt").fill(prompt);
  for (const [label, value] of Object.entries(settings))
    await page.getByLabel(label, { exact: true }).fill(String(value));
  await page.getByRole("button", { name: "Develop" }).click();
}

/** Waits until a print says this. */
export async function says(page: Page, text: string | RegExp): Promise<void> {
  await page.locator(".print").getByText(text).first().waitFor();
}

export async function shoot(page: Page, name: string): Promise<void> {
  await page.screenshot({ path: `${SHOTS}${name}.png`, fullPage: true });
}

/** Fails on whatever axe finds. */
export async function expectAccessible(page: Page): Promise<void> {
  const { violations } = await new AxeBuilder({ page }).analyze();
  expect(violations.map(({ id, nodes }) => [id, nodes.map(({ html }) => html)])).toEqual([]);
}
