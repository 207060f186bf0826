/** Folds the messages of one stream into its state: joins the chunks of a large final picture, finds the typed end. */

import { phaseFromWire, pictureFromWire, progressFromWire } from "./convert.js";
import { CalotypeError } from "./errors.js";
import type * as wire from "./gen/calotype/v1/calotype_pb.js";
import { fromMessage } from "./status.js";
import { isEnd, type Picture, type Progress } from "./types.js";

export class Assembler {
  /** The final picture, once it is complete. */
  picture: Picture | undefined;
  /** Why there will be none, once that is known. */
  error: CalotypeError | undefined;
  /** Whether the server has said so, and it is not only the connection that failed. */
  told = false;
  #chunks: Uint8Array[] = [];

  /** Whether it is known how the generation ended. */
  get ended(): boolean {
    return this.picture !== undefined || this.error !== undefined;
  }

  /**
   * Takes a message.
   *
   * @returns What to show for it: undefined for all but the last chunk of a final picture, and after the end.
   */
  feed(message: wire.Progress): Progress | undefined {
    if (this.ended) return undefined;
    const phase = phaseFromWire(message.phase);
    if (phase === "succeeded") return this.#addChunk(message);
    if (isEnd(phase)) {
      this.error = fromMessage(message.error, phase === "cancelled" ? "CANCELLED" : "INTERNAL");
      this.told = true;
    }
    return progressFromWire(message);
  }

  /** Notes that nothing more will come. The end that a message told counts more than the status of the call. */
  close(error?: CalotypeError): void {
    if (this.ended) return;
    const text = "The stream ended without saying how the generation ended.";
    this.error = error ?? new CalotypeError("UNKNOWN", text, { reason: "STREAM_INCOMPLETE" });
  }

  #addChunk(message: wire.Progress): Progress | undefined {
    if (message.chunkIndex === this.#chunks.length && message.image.length > 0) {
      this.#chunks.push(message.image);
      if (this.#chunks.length < message.chunkCount) return undefined;
      this.picture = pictureFromWire(message, join(this.#chunks));
      this.#chunks = [];
    }
    if (this.picture) return { ...progressFromWire(message), picture: this.picture };
    this.error = new CalotypeError("UNKNOWN", "A part of the final image is missing.", { reason: "STREAM_INCOMPLETE" });
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
