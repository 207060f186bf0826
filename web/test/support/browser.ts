/** Headless Chromium, and the helpers that tests of the page share. */

import { existsSync } from "node:fs";
import { mkdir } from "node:fs/promises";
import { AxeBuilder } from "@axe-core/playwright";
import { type Browser, type BrowserContextOptions, chromium, type Locator, type Page } from "playwright-core";
import { afterAll, afterEach, expect } from "vitest";

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

const SCREENSHOTS = new URL("../../../build/page/", import.meta.url).pathname;

/** Started by the first test that opens a page; all tests of a file share it. */
let browser: Promise<Browser> | undefined;
const consoleProblems: string[] = [];
/** Console messages that the current test expects. */
let allowedConsole: RegExp | undefined;

async function launch(): Promise<Browser> {
  if (!CHROMIUM)
    throw new Error("Chromium is missing; on Debian: apt-get install chromium. Elsewhere: CHROMIUM=/path/to/it");
  await mkdir(SCREENSHOTS, { recursive: true });
  return chromium.launch({ executablePath: CHROMIUM, headless: true, args: FLAGS });
}

afterEach(async () => {
  const contexts = (await browser)?.contexts() ?? [];
  await Promise.all(contexts.map((context) => context.close()));
  const unexpected = consoleProblems.splice(0).filter((text) => !allowedConsole?.test(text));
  allowedConsole = undefined;
  expect(unexpected).toEqual([]);
});

afterAll(async () => (await browser)?.close());

/** Allows matching console messages in the current test. Any other error or warning fails the test. */
export function allowConsole(pattern: RegExp): void {
  allowedConsole = pattern;
}

/** Opens a page in its own browser context. Every console error or warning, such as a CSP violation, fails the test. */
export async function openPage(url: string, options: BrowserContextOptions = {}): Promise<Page> {
  browser ??= launch();
  const context = await (await browser).newContext({ viewport: { width: 1200, height: 900 }, ...options });
  await context.addInitScript(RECORDER);
  // Generous, so that tests pass on a busy machine.
  context.setDefaultTimeout(60_000);
  context.on("page", recordConsole);
  const page = await context.newPage();
  await page.goto(url);
  return page;
}

function recordConsole(page: Page): void {
  page.on("pageerror", (error) => consoleProblems.push(String(error)));
  page.on("console", (message) => {
    if (["error", "warning"].includes(message.type())) consoleProblems.push(message.text());
  });
}

/** Returns the print that contains this text. */
export function printWithText(page: Page, text: string): Locator {
  return page.locator(".print").filter({ has: page.getByText(text, { exact: true }) });
}

export interface Recorded {
  /** Every picture that was shown, in all prints. */
  readonly shown: { step: number; kind: string; size: number; fingerprint: number }[];
  readonly percents: number[];
  readonly urls: { created: number; released: number };
}

/** Records the events of all `<calotype-view>` elements of the page, and counts object URLs. */
const RECORDER = `
  window.recorded = { shown: [], percents: [], urls: { created: 0, released: 0 } };
  addEventListener("calotype-picture", ({ detail }) => {
    const fingerprint = detail.data.reduce((hash, byte) => (hash * 31 + byte) >>> 0, 7);
    recorded.shown.push({ step: detail.step, kind: detail.kind, size: detail.data.length, fingerprint });
  });
  addEventListener("calotype-state", ({ target }) => {
    const bar = target.shadowRoot.querySelector("[role=progressbar]");
    recorded.percents.push(Number(bar.getAttribute("aria-valuenow")));
  });
  for (const [name, count] of [["createObjectURL", "created"], ["revokeObjectURL", "released"]]) {
    const original = URL[name];
    URL[name] = (value) => { recorded.urls[count] += 1; return original.call(URL, value); };
  }
`;

export async function recorded(page: Page): Promise<Recorded> {
  return page.evaluate<Recorded>("window.recorded");
}

/** Waits until the page shows `count` finished pictures. Returns their fingerprints. */
export async function finalFingerprints(page: Page, count: number): Promise<number[]> {
  const finals = async () => (await recorded(page)).shown.filter(({ kind }) => kind === "final");
  await expect.poll(async () => page.getByText(/^Finished/).count(), { timeout: 120_000 }).toBe(count);
  await expect.poll(async () => (await finals()).length).toBe(count);
  return (await finals()).map(({ fingerprint }) => fingerprint);
}

/** Enters a prompt and settings, and presses the button. */
export async function develop(
  page: Page,
  prompt: string,
  settings: Record<string, string | number> = {},
): Promise<void> {
  await page.locator("#develop:enabled").waitFor();
  await page.getByLabel(/^Prompt/).fill(prompt);
  for (const [label, value] of Object.entries(settings))
    await page.getByLabel(label, { exact: true }).fill(String(value));
  await page.getByRole("button", { name: "Develop" }).click();
}

/** Waits until a print shows this text. */
export async function waitForText(page: Page, text: string | RegExp): Promise<void> {
  await page.locator(".print").getByText(text).first().waitFor();
}

export async function screenshot(page: Page, name: string): Promise<void> {
  await page.screenshot({ path: `${SCREENSHOTS}${name}.png`, fullPage: true });
}

/** Fails if axe finds an accessibility problem. */
export async function expectAccessible(page: Page): Promise<void> {
  const { violations } = await new AxeBuilder({ page }).analyze();
  expect(violations.map(({ id, nodes }) => [id, nodes.map(({ html }) => html)])).toEqual([]);
}
