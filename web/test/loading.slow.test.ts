import { execFileSync } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { CalotypeError, createClient, isLoading, type Picture } from "calotype";
import { expect, it, onTestFinished } from "vitest";
import { fingerprint, PROMPT, pictureFingerprint, Service } from "./support/service_process.js";

const STEPS = 60;

it("the client outlasts a service that loads for longer than all retries after a kill", async () => {
  const folder = mkdtempSync(join(tmpdir(), "calotype-"));
  onTestFinished(() => rmSync(folder, { recursive: true }));
  const pipe = join(folder, "pipe");
  execFileSync("mkfifo", [pipe]);
  const first = await Service.start(["--deterministic"]);
  onTestFinished(() => first.kill());
  const expected = await pictureFingerprint(first, 5, STEPS);
  const client = createClient(first.url);
  let second: Service | undefined;
  onTestFinished(() => second?.kill());
  let answers = 0;
  const generation = client.generate(PROMPT, {
    seed: 5,
    steps: STEPS,
    preview: { method: "none" },
    retries: 2,
    onReconnect: ({ error }) => {
      answers += Number(isLoading(error));
      if (answers === 4) writeFileSync(pipe, "");
    },
  });
  let picture: Picture | undefined;
  for await (const { step, picture: shown } of generation) {
    picture = shown;
    if (step < 5 || second) continue;
    await first.kill();
    second = Service.startSlowly(["--deterministic", "--web-address", new URL(first.url).host], pipe);
    const probe = client.getModel({ waitForServer: 60, loadingTimeout: 0 });
    await expect(probe).rejects.toThrow(CalotypeError);
    await expect(probe).rejects.toMatchObject({ reason: "NOT_READY" });
  }
  expect(picture && fingerprint(picture.data)).toBe(expected);
  expect(answers).toBeGreaterThanOrEqual(4);
}, 240_000);
