import { createClient, type GenerationSummary, type Picture } from "calotype";
import { afterAll, beforeAll, expect, it, onTestFinished } from "vitest";
import { develop, open, recorded, tolerate } from "./browser.js";
import { Service } from "./service.js";

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
  bridge = await Service.bridge(services);
}, 240_000);

afterAll(async () => {
  await Promise.all([bridge, ...(services ?? [])].map((each) => each?.kill()));
});

/** The picture that a service makes undisturbed. */
async function picture(service: Service, seed: number): Promise<number> {
  const { data } = await createClient(service.url).generate("octopus", { seed, steps: STEPS }).result();
  return fingerprint(data);
}

it("a service behind the bridge that freezes costs the client time and nothing else", async () => {
  const [frozen, other] = services;
  onTestFinished(() => frozen.thaw());
  const undisturbed = [await picture(frozen, 1), await picture(other, 2)];
  const own = new Set((await list(frozen)).map(tag));
  const client = createClient(bridge.url);
  const homes: string[] = [];
  const run = async (seed: number) => {
    let final: Picture | undefined;
    for await (const progress of client.generate("octopus", { seed, steps: STEPS, stallTimeout: 3 })) {
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
  await develop(page, "octopus", { Seed: 10, Steps: STEPS, Pictures: PICTURES });
  const halfway = async () => (await list(killed)).filter(({ phase, step }) => phase === "denoising" && step > 0);
  await expect.poll(halfway, { timeout: 30_000 }).not.toEqual([]);
  await killed.kill();
  await expect.poll(async () => page.getByText(/^Finished/).count(), { timeout: 120_000 }).toBe(PICTURES);
  const finals = async () => (await recorded(page)).shown.filter(({ kind }) => kind === "final");
  await expect.poll(async () => (await finals()).length).toBe(PICTURES);
  const shown = (await finals()).map((each) => each.fingerprint);
  const seeds = Array.from({ length: PICTURES }, (_, index) => 10 + index);
  expect(shown.sort()).toEqual((await Promise.all(seeds.map((seed) => picture(other, seed)))).sort());
}, 240_000);

async function list(service: Service): Promise<GenerationSummary[]> {
  const summaries: GenerationSummary[] = [];
  for await (const summary of createClient(service.url).generations()) summaries.push(summary);
  return summaries;
}

/** Of the service that has a generation. */
function tag({ generationId }: { readonly generationId: string }): string {
  return generationId.split(".")[0] ?? "";
}

/** As the recorder of browser.ts counts. */
function fingerprint(data: Uint8Array): number {
  return data.reduce((hash, byte) => (hash * 31 + byte) >>> 0, 7);
}
