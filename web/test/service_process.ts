/** `calotype serve` as a process of its own, with the bundled model. */

import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync, mkdtempSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { createClient, type GenerationSummary } from "calotype";

const ROOT = new URL("../../", import.meta.url).pathname;
const PYTHON = process.env.CALOTYPE_PYTHON ?? `${ROOT}.venv/bin/python`;

/** Shared, so that only the first service measures its model. */
const CACHE = mkdtempSync(join(tmpdir(), "calotype-"));

interface LogLine {
  readonly event: string;
  readonly generation?: string;
  readonly outcome?: string;
}

export class Service {
  /** Where it serves the page, such as http://127.0.0.1:8080. */
  url = "";
  /** Where it serves native gRPC; empty for a bridge. */
  address = "";
  readonly log: LogLine[] = [];
  readonly #process: ChildProcess;
  readonly #output: string[] = [];
  #woken: () => void = () => {};

  private constructor(command: string, webAddress: string, flags: readonly string[]) {
    if (!existsSync(PYTHON)) throw new Error(`${PYTHON} is missing: run \`make test-web\`, or set CALOTYPE_PYTHON.`);
    const own = ["-m", "calotype", command, "--web-address", webAddress, "--log-format", "json"];
    this.#process = spawn(PYTHON, [...own, ...flags], {
      env: { ...process.env, HF_HUB_OFFLINE: "1", OMP_WAIT_POLICY: "PASSIVE" },
      stdio: ["ignore", "pipe", "pipe"],
    });
  }

  /** Starts it, and waits until it takes requests. */
  static async start(flags: readonly string[] = [], webAddress = "127.0.0.1:0"): Promise<Service> {
    const own = ["--grpc-address", "127.0.0.1:0", "--cache-dir", CACHE];
    const service = new Service("serve", webAddress, [...own, ...flags]);
    await service.#listen();
    return service;
  }

  /** Starts a bridge to others. */
  static async bridge(upstreams: readonly string[]): Promise<Service> {
    const bridge = new Service("bridge", "127.0.0.1:0", ["--upstream", upstreams.join(",")]);
    await bridge.#listen();
    return bridge;
  }

  async #listen(): Promise<void> {
    const { stdout, stderr } = this.#process;
    if (!stdout || !stderr) throw new Error("no pipes");
    createInterface({ input: stderr }).on("line", (line) => {
      this.#output.push(line);
      if (line.startsWith("{")) this.log.push(JSON.parse(line) as LogLine);
      this.#woken();
    });
    for await (const line of createInterface({ input: stdout })) {
      this.#output.push(line);
      this.address = /gRPC +(\S+)/.exec(line)?.[1] ?? this.address;
      this.url = /https?:\/\/\S+/.exec(line)?.[0].replace(/\/$/, "") ?? this.url;
      if (line.includes("Ctrl-C")) return;
    }
    throw new Error(`the service did not start:\n${this.#output.join("\n")}`);
  }

  /** What was logged of generations that ended, but for those that the service makes for itself when it starts. */
  get ended(): readonly LogLine[] {
    return this.log.filter(({ event }) => event === "generation ended").slice(WARM_UPS);
  }

  /** Waits until `count` generations have ended, and returns how the last of them did. */
  async outcome(count: number): Promise<string | undefined> {
    while (this.ended.length < count) {
      await new Promise<void>((resolve) => {
        this.#woken = resolve;
      });
    }
    return this.ended[count - 1]?.outcome;
  }

  /** Stops it where it is: its connections stay, and nothing answers. */
  freeze(): void {
    this.#process.kill("SIGSTOP");
  }

  /** Lets it go on. */
  thaw(): void {
    this.#process.kill("SIGCONT");
  }

  /** Ends it at once, as a crash does. */
  async kill(): Promise<void> {
    if (this.#process.exitCode !== null || this.#process.signalCode !== null) return;
    this.#process.kill("SIGKILL");
    await once(this.#process, "exit");
  }
}

const WARM_UPS = 2;

/** Of every picture that is compared. */
export const PROMPT = "octopus";

/** The fingerprint of the picture that a service makes undisturbed. */
export async function picture(service: Service, seed: number, steps: number): Promise<number> {
  return fingerprint((await createClient(service.url).generate(PROMPT, { seed, steps }).result()).data);
}

export async function list(service: Service): Promise<GenerationSummary[]> {
  const summaries: GenerationSummary[] = [];
  for await (const summary of createClient(service.url).generations()) summaries.push(summary);
  return summaries;
}

/** Of the service that has a generation. */
export function tag({ generationId }: { readonly generationId: string }): string {
  return generationId.split(".")[0] ?? "";
}

/** As the recorder of browser.ts counts. */
export function fingerprint(data: Uint8Array): number {
  return data.reduce((hash, byte) => (hash * 31 + byte) >>> 0, 7);
}
