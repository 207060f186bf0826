/** The built page and a service whose behavior is defined by the test. */

import { readFile } from "node:fs/promises";
import type { RequestListener } from "node:http";
import { extname } from "node:path";
import { deflateSync } from "node:zlib";
import { onTestFinished } from "vitest";
import {
  type GenerateRequest,
  ImageFormat,
  ModelSchema,
  Phase,
  PreviewMethod,
  PreviewOptionsSchema,
  type Progress,
} from "../../../client/typescript/src/gen/calotype/v1/calotype_pb.js";
import {
  Code,
  ConnectError,
  create,
  disconnected,
  final as finalMessage,
  type HandlerContext,
  type Handlers,
  preview as previewMessage,
  StubServer,
} from "../../../client/typescript/test/stub_server.js";

export * from "../../../client/typescript/src/gen/calotype/v1/calotype_pb.js";
export * from "../../../client/typescript/src/gen/google/rpc/error_details_pb.js";
export {
  Code,
  ConnectError,
  create,
  disconnected,
  type HandlerContext,
  type Handlers,
  progress,
  StubServer,
} from "../../../client/typescript/test/stub_server.js";

const PAGE = new URL("../../../service/calotype_server/page/", import.meta.url).pathname;

/** The content security policy of the service. */
const POLICY =
  "default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self'; img-src 'self' blob:; connect-src 'self'; " +
  "base-uri 'none'; form-action 'self'; frame-ancestors 'none'; require-trusted-types-for 'script'";

const TYPES: Record<string, string> = {
  ".css": "text/css",
  ".html": "text/html",
  ".js": "text/javascript",
  ".svg": "image/svg+xml",
  ".woff2": "font/woff2",
};

const servePage: RequestListener = async ({ url }, response) => {
  const path = new URL(url ?? "/", "http://page").pathname.replace(/\/$/, "/index.html");
  try {
    const file = await readFile(PAGE + path);
    response.writeHead(200, {
      "content-security-policy": POLICY,
      "content-type": TYPES[extname(path)] ?? "text/plain",
    });
    response.end(file);
  } catch {
    response.writeHead(404).end();
  }
};

export const MODEL = create(ModelSchema, {
  name: "some/model",
  pipeline: "StableDiffusionPipeline",
  widthPx: 64,
  heightPx: 48,
  sizeMultiplePx: 8,
  maxPixels: 128 * 128,
  stepCount: 8,
  maxStepCount: 50,
  guidanceScale: 7.5,
  takesNegativePrompt: true,
  scheduler: "DDIMScheduler",
  schedulers: ["DDIMScheduler", "EulerDiscreteScheduler"],
  maxPromptChars: 100,
  device: "cuda:0",
  dtype: "float16",
  serverVersion: "0.1.0",
  previewMethods: [PreviewMethod.HEAD, PreviewMethod.FULL_VAE],
  preview: create(PreviewOptionsSchema, { everySteps: 1, maxEdgePx: 512, quality: 75, method: PreviewMethod.AUTO }),
  maxPreviewEdgePx: 512,
  maxPreviewQuality: 75,
});

/** Serves the page and these handlers until the test has finished. */
export async function serveScripted(handlers: Handlers): Promise<{ url: string; stub: StubServer }> {
  const stub = new StubServer({ getModel: () => MODEL, ...handlers }, servePage);
  const url = await stub.start();
  onTestFinished(() => stub.stop());
  return { url, stub };
}

/** A preview whose picture is different at every step. */
export function preview(step: number) {
  const message = previewMessage(step, png(64, 48, step));
  return { ...message, imageFormat: ImageFormat.PNG, widthPx: 64, heightPx: 48, totalSteps: 8 };
}

export function final() {
  return { ...finalMessage(png(64, 48, 8)), widthPx: 64, heightPx: 48, step: 8, imageStep: 8, totalSteps: 8 };
}

/** A generation whose messages are defined by the test. It sends them to every reader. */
export class ScriptedGeneration {
  readonly requests: GenerateRequest[] = [];
  readonly cancelled: string[] = [];
  /** Whether the service no longer has the generation. */
  isLost = false;
  /** Whether the service rejects readers that reconnect. */
  isUnavailable = false;
  readonly #events: Progress[] = [];
  #changed = new Gate();

  /** Sends messages to all readers. */
  send(...messages: Progress[]): void {
    this.#events.push(...messages);
    this.#changed.open();
    this.#changed = new Gate();
  }

  readonly handlers: Handlers = {
    generate: (request, context) => {
      this.requests.push(request);
      return this.#follow(0n, context);
    },
    watch: ({ generationId, afterSequence }, context) => {
      if (this.isUnavailable) throw new ConnectError("", Code.Unavailable);
      if (this.isLost || generationId !== "g") throw new ConnectError("", Code.NotFound);
      return this.#follow(afterSequence, context);
    },
    cancel: ({ generationId }) => {
      this.cancelled.push(generationId);
      return {};
    },
    finish: () => {
      const last = this.#events.at(-1);
      this.send({ ...final(), sequence: 99n, step: last?.step ?? 0, finishedEarly: true });
      return {};
    },
    listGenerations: () => ({ generations: [{ generationId: "g", prompt: this.requests[0]?.prompt ?? "" }] }),
  };

  async *#follow(afterSequence: bigint, context: HandlerContext) {
    let sequence = afterSequence;
    for (;;) {
      const changed = this.#changed.opened;
      for (const message of this.#events.filter((each) => each.sequence > sequence)) {
        yield message;
        sequence = message.sequence;
        if (message.phase === Phase.SUCCEEDED) return;
      }
      await Promise.race([changed, disconnected(context)]);
      if (context.signal.aborted) return;
    }
  }
}

/** A promise that the test resolves with `open`. */
export class Gate {
  readonly opened: Promise<void>;
  open: () => void = () => {};

  constructor() {
    this.opened = new Promise((resolve) => {
      this.open = resolve;
    });
  }
}

/** Returns a PNG file of a sun that rises with the step. */
function png(width: number, height: number, step: number): Uint8Array {
  const rows = Buffer.alloc(height * (1 + width * 3));
  for (let y = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1) {
      const sun = Math.hypot(x - width / 2, y - (height - step * 4)) < 9;
      rows.set(
        sun ? [240, 190 - step * 6, 70] : [120 - step * 6, 120 + y, 150 + step * 8],
        y * (1 + width * 3) + 1 + x * 3,
      );
    }
  }
  const header = Buffer.alloc(13);
  header.writeUInt32BE(width, 0);
  header.writeUInt32BE(height, 4);
  header.set([8, 2, 0, 0, 0], 8);
  const signature = Buffer.from([137, 80, 78, 71, 13, 10, 26, 10]);
  return Buffer.concat([
    signature,
    chunk("IHDR", header),
    chunk("IDAT", deflateSync(rows)),
    chunk("IEND", Buffer.alloc(0)),
  ]);
}

function chunk(type: string, data: Buffer): Buffer {
  const body = Buffer.concat([Buffer.from(type), data]);
  const framed = Buffer.alloc(body.length + 8);
  framed.writeUInt32BE(data.length, 0);
  framed.set(body, 4);
  framed.writeUInt32BE(crc(body), body.length + 4);
  return framed;
}

function crc(data: Buffer): number {
  let value = 0xffffffff;
  for (const byte of data) {
    value ^= byte;
    for (let bit = 0; bit < 8; bit += 1) value = (value >>> 1) ^ (value & 1 ? 0xedb88320 : 0);
  }
  return (value ^ 0xffffffff) >>> 0;
}
