import { execFileSync, spawn } from "node:child_process";
import { mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import type { AddressInfo } from "node:net";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, it, onTestFinished } from "vitest";
import { develop, openPage, printWithText } from "./support/browser.js";
import { disconnected, final, Gate, Phase, progress, serveScripted } from "./support/scripted_service.js";

const CONF = new URL("../../service/nginx.conf", import.meta.url);

function installed(): boolean {
  try {
    execFileSync("nginx", ["-v"], { stdio: "ignore" });
    return true;
  } catch {
    return false;
  }
}

async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const { port } = server.address() as AddressInfo;
  await new Promise((resolve) => server.close(resolve));
  return port;
}

/** Starts nginx with the recommended configuration and test addresses. Returns its URL. */
async function startNginx(upstream: string): Promise<string> {
  const folder = mkdtempSync(join(tmpdir(), "calotype-nginx-"));
  const [certificate, key, port] = [join(folder, "pem"), join(folder, "key"), await freePort()];
  const subject = ["-subj", "/CN=localhost", "-days", "2"];
  execFileSync(
    "openssl",
    ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, ...subject],
    { stdio: "ignore" },
  );
  const site = readFileSync(CONF, "utf8")
    .replace("127.0.0.1:8080", new URL(upstream).host)
    .replace("listen 443", `listen 127.0.0.1:${port}`)
    .replace("/etc/ssl/images.example.org.pem", certificate)
    .replace("/etc/ssl/images.example.org.key", key);
  const main = `daemon off; pid ${folder}/pid; error_log stderr; events {} http { access_log off; ${site} }`;
  writeFileSync(join(folder, "nginx.conf"), main);
  const nginx = spawn("nginx", ["-p", folder, "-c", join(folder, "nginx.conf")], { stdio: "ignore" });
  onTestFinished(() => void nginx.kill());
  return `https://localhost:${port}/`;
}

it.skipIf(!installed())("behind nginx with HTTP/2 all pictures run at once, and can be cancelled", async () => {
  const finish = new Gate();
  let running = 0;
  const cancelled: string[] = [];
  const { url } = await serveScripted({
    async *generate({ seed }, context) {
      running += 1;
      yield progress({ sequence: 1n, phase: Phase.DENOISING, seed: seed ?? 0n });
      await Promise.race([finish.opened, disconnected(context)]);
      if (context.signal.aborted) cancelled.push(String(seed));
      yield final();
    },
  });
  const page = await openPage(await startNginx(url), { ignoreHTTPSErrors: true });
  await develop(page, "sunrise", { Seed: 10, Pictures: 9 });
  await expect.poll(() => running).toBe(9);
  await printWithText(page, "Seed 10").getByRole("button", { name: "Cancel" }).click();
  await expect.poll(() => cancelled).toEqual(["10"]);
  finish.open();
  await expect.poll(async () => page.getByText(/^Finished/).count()).toBe(8);
});
