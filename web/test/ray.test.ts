import { afterAll, beforeAll, expect, it } from "vitest";
import { allowConsole, develop, finalFingerprints, openPage, screenshot } from "./support/browser.js";
import { list, PROMPT, pictureFingerprint, Service, serverTag } from "./support/service_process.js";

const PICTURES = 8;
const STEPS = 20;

/** Address of two replicas, and process id of one of them; set by tests/cluster/test_ray.py. */
const UPSTREAM = process.env.CALOTYPE_RAY_ADDRESS;
const VICTIM = Number(process.env.CALOTYPE_RAY_VICTIM);

let bridge: Service;

beforeAll(async () => {
  if (UPSTREAM) bridge = await Service.bridge([UPSTREAM]);
});

afterAll(() => bridge?.kill());

it.skipIf(!UPSTREAM)(
  "the page resumes and shows the same pictures after a replica behind Ray's ingress is killed",
  async () => {
    allowConsole(/ERR_|Failed to load resource/);
    const page = await openPage(bridge.url);
    await develop(page, PROMPT, { Seed: 10, Steps: STEPS, Pictures: PICTURES });
    const activeServers = async () =>
      new Set((await list(bridge)).filter(({ phase, step }) => phase === "denoising" && step > 0).map(serverTag)).size;
    await expect.poll(activeServers).toBe(2);
    process.kill(VICTIM, "SIGKILL");
    const shown = await finalFingerprints(page, PICTURES);
    await screenshot(page, "ray");
    const seeds = Array.from({ length: PICTURES }, (_, index) => 10 + index);
    expect(shown.sort()).toEqual(
      (await Promise.all(seeds.map((seed) => pictureFingerprint(bridge, seed, STEPS)))).sort(),
    );
  },
  240_000,
);
