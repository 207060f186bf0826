import { createClient, type Picture } from "calotype";
import { afterAll, beforeAll, expect, it, onTestFinished } from "vitest";
import { develop, finals, open, tolerate } from "./browser.js";
import { fingerprint, list, PROMPT, picture, Service, tag } from "./service_process.js";

const PICTURES = 8;
const STEPS = 20;

let services: [Service, Service];
let bridge: Service;

beforeAll(async () => {
  const flags = [
    "--deterministic",
    "--max-active",
    "4",
    "--max-batch-rows",
    "8",
    "--heartbeat-seconds",
    "0.5",
    "--threads",
    "1",
  ];
  services = await Promise.all([Service.start(flags), Service.start(flags)]);
  bridge = await Service.bridge(services.map(({ address }) => address));
}, 240_000);

afterAll(async () => {
  await Promise.all([bridge, ...(services ?? [])].map((each) => each?.kill()));
});

it("a service behind the bridge that freezes costs the client time and nothing else", async () => {
  const [frozen, other] = services;
  onTestFinished(() => frozen.thaw());
  const undisturbed = [await picture(frozen, 1, STEPS), await picture(other, 2, STEPS)];
  const own = new Set((await list(frozen)).map(tag));
  const client = createClient(bridge.url);
  const homes: string[] = [];
  const run = async (seed: number) => {
    let final: Picture | undefined;
    for await (const progress of client.generate(PROMPT, { seed, steps: STEPS, stallTimeout: 3 })) {
      final = progress.picture;
      if (progress.phase === "denoising" && progress.step > 0 && own.has(tag(progress))) frozen.freeze();
      if (own.has(tag(progress))) homes.push(`${seed} frozen`);
      else if (homes.includes(`${seed} frozen`)) homes.push(`${seed} replaced`);
    }
    return final && fingerprint(final.data);
  };
  expect(await Promise.all([1, 2].map(run))).toEqual(undisturbed);
  expect(homes.filter((home) => home.endsWith("replaced"))).not.toEqual([]);
}, 240_000);

it("a service behind the bridge that is killed: the page goes on to the same pictures", async () => {
  tolerate(/ERR_|Failed to load resource/);
  const [killed, other] = services;
  const page = await open(bridge.url);
  await develop(page, PROMPT, { Seed: 10, Steps: STEPS, Pictures: PICTURES });
  const halfway = async () => (await list(killed)).filter(({ phase, step }) => phase === "denoising" && step > 0);
  await expect.poll(halfway, { timeout: 30_000 }).not.toEqual([]);
  await killed.kill();
  const seeds = Array.from({ length: PICTURES }, (_, index) => 10 + index);
  const undisturbed = Promise.all(seeds.map((seed) => picture(other, seed, STEPS)));
  expect((await finals(page, PICTURES)).sort()).toEqual((await undisturbed).sort());
}, 240_000);
