import { createClient, type Picture } from "calotype";
import { afterAll, beforeAll, expect, it, onTestFinished } from "vitest";
import { allowConsole, develop, finalFingerprints, openPage } from "./support/browser.js";
import { fingerprint, list, PROMPT, pictureFingerprint, Service, serverTag } from "./support/service_process.js";

const PICTURES = 8;
const STEPS = 20;

let services: [Service, Service];
let bridge: Service;

beforeAll(async () => {
  const flags = ["--deterministic", "--max-active", "4", "--max-batch-rows", "8", "--heartbeat-seconds", "0.5"];
  services = await Promise.all([Service.start(flags), Service.start(flags)]);
  bridge = await Service.bridge(services.map(({ address }) => address));
}, 240_000);

afterAll(async () => {
  await Promise.all([bridge, ...(services ?? [])].map((each) => each?.kill()));
});

it("the client gets the same pictures after a service behind the bridge freezes", async () => {
  const [frozen, other] = services;
  onTestFinished(() => frozen.thaw());
  const expected = [await pictureFingerprint(frozen, 1, STEPS), await pictureFingerprint(other, 2, STEPS)];
  const own = new Set((await list(frozen)).map(serverTag));
  const client = createClient(bridge.url);
  const servers: string[] = [];
  const run = async (seed: number) => {
    let final: Picture | undefined;
    for await (const progress of client.generate(PROMPT, { seed, steps: STEPS, stallTimeout: 3 })) {
      final = progress.picture;
      if (progress.phase === "denoising" && progress.step > 0 && own.has(serverTag(progress))) frozen.freeze();
      if (own.has(serverTag(progress))) servers.push(`${seed} frozen`);
      else if (servers.includes(`${seed} frozen`)) servers.push(`${seed} replaced`);
    }
    return final && fingerprint(final.data);
  };
  expect(await Promise.all([1, 2].map(run))).toEqual(expected);
  expect(servers.filter((server) => server.endsWith("replaced"))).not.toEqual([]);
}, 240_000);

it("the page shows the same pictures after a service behind the bridge is killed", async () => {
  allowConsole(/ERR_|Failed to load resource/);
  const [killed, other] = services;
  const page = await openPage(bridge.url);
  await develop(page, PROMPT, { Seed: 10, Steps: STEPS, Pictures: PICTURES });
  const running = async () => (await list(killed)).filter(({ phase, step }) => phase === "denoising" && step > 0);
  await expect.poll(running, { timeout: 30_000 }).not.toEqual([]);
  await killed.kill();
  const seeds = Array.from({ length: PICTURES }, (_, index) => 10 + index);
  const expected = Promise.all(seeds.map((seed) => pictureFingerprint(other, seed, STEPS)));
  expect((await finalFingerprints(page, PICTURES)).sort()).toEqual((await expected).sort());
}, 240_000);
