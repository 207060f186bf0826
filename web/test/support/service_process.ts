/** Processes of `calotype serve` with the bundled model, and of `calotype bridge`. */

import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync } from "node:fs";
import { createInterface } from "node:readline";
import { createClient, type GenerationSummary, isEnd } from "calotype";
import { expect, inject } from "vitest";

const ROOT = new URL("../../../", import.meta.url).pathname;
const SLOW_LOADING_SERVER = `${ROOT}tests/support/servers/slow_loading.py`;
const PYTHON = process.env.CALOTYPE_PYTHON ?? `${ROOT}.venv/bin/python`;

interface LogLine {
  readonly event: string;
  readonly generation?: string;
  readonly outcome?: string;
}

/** A fixed number of threads saves the measurement at the start, and leaves a core for the browser. */
function serveFlags(): string[] {
  return ["--grpc-address", "127.0.0.1:0", "--cache-dir", inject("cacheDir"), "--threads", "1"];
}

export class Service {
  /** Address of the page, such as http://127.0.0.1:8080. */
  url = "";
  /** Address of native gRPC; empty for a bridge. */
  address = "";
  readonly log: LogLine[] = [];
  readonly #process: ChildProcess;
  readonly #output: string[] = [];
  #onLine: () => void = () => {};

  private constructor(command: string, flags: readonly string[], pipe?: string) {
    if (!existsSync(PYTHON)) throw new Error(`${PYTHON} is missing: run \`make test-web\`, or set CALOTYPE_PYTHON.`);
    const program = pipe === undefined ? ["-m", "calotype"] : ["-P", SLOW_LOADING_SERVER];
    const baseFlags = [command, "--web-address", "127.0.0.1:0", "--log-format", "json"];
    this.#process = spawn(PYTHON, [...program, ...baseFlags, ...flags], {
      env: { ...process.env, HF_HUB_OFFLINE: "1", OMP_WAIT_POLICY: "PASSIVE", ...(pipe && { LOAD_WHEN: pipe }) },
      stdio: ["ignore", "pipe", "pipe"],
    });
  }

  /** Starts a service with one thread, and waits until it accepts requests. */
  static async start(flags: readonly string[] = []): Promise<Service> {
    const service = new Service("serve", [...serveFlags(), ...flags]);
    await service.#waitUntilReady();
    return service;
  }

  /** Starts a service that loads its model only after `pipe`, a named pipe, is opened for writing. Does not wait. */
  static startSlowly(flags: readonly string[], pipe: string): Service {
    return new Service("serve", [...serveFlags(), ...flags], pipe);
  }

  /** Starts a bridge to other servers. */
  static async bridge(upstreams: readonly string[]): Promise<Service> {
    const bridge = new Service("bridge", ["--upstream", upstreams.join(",")]);
    await bridge.#waitUntilReady();
    return bridge;
  }

  async #waitUntilReady(): Promise<void> {
    const { stdout, stderr } = this.#process;
    if (!stdout || !stderr) throw new Error("The process has no pipes.");
    createInterface({ input: stderr }).on("line", (line) => {
      this.#output.push(line);
      if (line.startsWith("{")) this.log.push(JSON.parse(line) as LogLine);
      this.#onLine();
    });
    for await (const line of createInterface({ input: stdout })) {
      this.#output.push(line);
      this.address = /gRPC +(\S+)/.exec(line)?.[1] ?? this.address;
      this.url = /https?:\/\/\S+/.exec(line)?.[0].replace(/\/$/, "") ?? this.url;
      if (line.includes("Ctrl-C")) return;
    }
    throw new Error(`The service did not start:\n${this.#output.join("\n")}`);
  }

  /** The log lines of ended generations. */
  get ended(): readonly LogLine[] {
    return this.log.filter(({ event }) => event === "generation ended");
  }

  /** Waits until `count` generations have ended. Returns the outcome of the last one. */
  async outcome(count: number): Promise<string | undefined> {
    while (this.ended.length < count) {
      await new Promise<void>((resolve) => {
        this.#onLine = resolve;
      });
    }
    return this.ended[count - 1]?.outcome;
  }

  /** Cancels all generations, and waits until they have ended, so that a test does not slow the next one. */
  async cancelAll(): Promise<void> {
    const client = createClient(this.url);
    const active = (await list(this)).filter(({ phase }) => !isEnd(phase)).map(({ generationId }) => generationId);
    await Promise.all(active.map((id) => client.cancel(id)));
    await expect.poll(() => active.filter((id) => !this.ended.some(({ generation }) => generation === id))).toEqual([]);
  }

  /** Suspends the process: its connections stay open, and nothing responds. */
  freeze(): void {
    this.#process.kill("SIGSTOP");
  }

  /** Resumes the process after `freeze`. */
  thaw(): void {
    this.#process.kill("SIGCONT");
  }

  /** Kills the process, like a crash. */
  async kill(): Promise<void> {
    if (this.#process.exitCode !== null || this.#process.signalCode !== null) return;
    this.#process.kill("SIGKILL");
    await once(this.#process, "exit");
  }
}

/** The prompt of every picture that tests compare. */
export const PROMPT = "octopus";

/** Returns the fingerprint of a picture that the service generates without any disturbance. */
export async function pictureFingerprint(service: Service, seed: number, steps: number): Promise<number> {
  const options = { seed, steps, preview: { method: "none" } } as const;
  return fingerprint((await createClient(service.url).generate(PROMPT, options).result()).data);
}

export async function list(service: Service): Promise<GenerationSummary[]> {
  const summaries: GenerationSummary[] = [];
  for await (const summary of createClient(service.url).generations()) summaries.push(summary);
  return summaries;
}

/** Returns the tag of the server that runs a generation: the first part of the generation's id. */
export function serverTag({ generationId }: { readonly generationId: string }): string {
  return generationId.split(".")[0] ?? "";
}

/** The same hash as in `RECORDER` of browser.ts. */
export function fingerprint(data: Uint8Array): number {
  return data.reduce((hash, byte) => (hash * 31 + byte) >>> 0, 7);
}
