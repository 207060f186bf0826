/** Assembles the messages of one stream: joins the chunks of a large final picture and detects the typed end. */

import { phaseFromWire, pictureFromWire, progressFromWire } from "./convert.js";
import { CalotypeError } from "./errors.js";
import type * as wire from "./gen/calotype/v1/calotype_pb.js";
import { fromMessage } from "./status.js";
import { isEnd, type Picture, type Progress } from "./types.js";

export class Assembler {
  #picture: Picture | undefined;
  #error: CalotypeError | undefined;
  #endedByServer = false;
  #chunks: Uint8Array[] = [];

  /** The reason why the stream has no final picture; undefined while it is open and after success. */
  get error(): CalotypeError | undefined {
    return this.#error;
  }

  /** Whether `error` comes from the server's typed end, rather than from a failed connection. */
  get endedByServer(): boolean {
    return this.#endedByServer;
  }

  /** Whether the outcome of the stream is known. */
  get ended(): boolean {
    return this.#picture !== undefined || this.#error !== undefined;
  }

  /**
   * Adds a message.
   *
   * @returns The progress to show. Undefined for incomplete chunks of the final picture, and after the end.
   */
  feed(message: wire.Progress): Progress | undefined {
    if (this.ended) return undefined;
    const phase = phaseFromWire(message.phase);
    if (phase === "succeeded") return this.#addChunk(message);
    if (isEnd(phase)) {
      this.#error = fromMessage(message.error, phase === "cancelled" ? "CANCELLED" : "INTERNAL");
      this.#endedByServer = true;
    }
    return progressFromWire(message);
  }

  /** Ends the stream. A typed end received before takes precedence over the status of the call. */
  close(error?: CalotypeError): void {
    if (this.ended) return;
    const text = "The stream ended without saying how the generation ended.";
    this.#error = error ?? new CalotypeError("UNKNOWN", text, { reason: "STREAM_INCOMPLETE" });
  }

  #addChunk(message: wire.Progress): Progress | undefined {
    if (message.chunkIndex === this.#chunks.length && message.image.length > 0) {
      this.#chunks.push(message.image);
      if (this.#chunks.length < message.chunkCount) return undefined;
      this.#picture = pictureFromWire(message, join(this.#chunks));
      this.#chunks = [];
    }
    if (this.#picture) return { ...progressFromWire(message), picture: this.#picture };
    const text = "A part of the final image is missing.";
    this.#error = new CalotypeError("UNKNOWN", text, { reason: "STREAM_INCOMPLETE" });
    return undefined;
  }
}

function join(chunks: readonly Uint8Array[]): Uint8Array {
  const joined = new Uint8Array(chunks.reduce((length, chunk) => length + chunk.length, 0));
  let offset = 0;
  for (const chunk of chunks) {
    joined.set(chunk, offset);
    offset += chunk.length;
  }
  return joined;
}
