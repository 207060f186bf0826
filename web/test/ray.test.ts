import { afterAll, beforeAll, expect, it } from "vitest";
import { develop, finals, open, shoot, tolerate } from "./browser.js";
import { list, PROMPT, picture, Service, tag } from "./service_process.js";

const PICTURES = 8;
const STEPS = 20;

/** Two replicas behind one address, and the process of one of them: tests/cluster/test_ray.py has them. */
const UPSTREAM = process.env.CALOTYPE_RAY_ADDRESS;
const VICTIM = Number(process.env.CALOTYPE_RAY_VICTIM);

let bridge: Service;

beforeAll(async () => {
  if (UPSTREAM) bridge = await Service.bridge([UPSTREAM]);
});

afterAll(() => bridge?.kill());

it.skipIf(!UPSTREAM)(
  "a replica that is killed behind Ray's ingress: the page goes on to the same pictures",
  async () => {
    tolerate(/ERR_|Failed to load resource/);
    const page = await open(bridge.url);
    await develop(page, PROMPT, { Seed: 10, Steps: STEPS, Pictures: PICTURES });
    const atWork = async () =>
      new Set((await list(bridge)).filter(({ phase, step }) => phase === "denoising" && step > 0).map(tag)).size;
    await expect.poll(atWork).toBe(2);
    process.kill(VICTIM, "SIGKILL");
    const shown = await finals(page, PICTURES);
    await shoot(page, "ray");
    const seeds = Array.from({ length: PICTURES }, (_, index) => 10 + index);
    expect(shown.sort()).toEqual((await Promise.all(seeds.map((seed) => picture(bridge, seed, STEPS)))).sort());
  },
  240_000,
);
