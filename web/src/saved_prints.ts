/** The prints of this tab, in `sessionStorage`, so that they survive a reload. */

import type { GenerationRequest } from "./generation_request";

export interface SavedPrint {
  /** Id of the request. Sending it twice starts only one generation. */
  readonly requestId: string;
  /** Id of the generation, once it is known. */
  readonly generationId?: string | undefined;
  /** Undefined for a generation started elsewhere. */
  readonly request?: GenerationRequest | undefined;
}

const STORAGE_KEY = "calotype.prints";

export class SavedPrints {
  readonly #prints: Map<string, SavedPrint>;

  constructor() {
    this.#prints = new Map(load().map((print) => [print.requestId, print]));
  }

  /** All saved prints, oldest first. */
  get all(): readonly SavedPrint[] {
    return [...this.#prints.values()];
  }

  /** Saves a print. Replaces an older one with the same request id. */
  save(print: SavedPrint): void {
    this.#prints.set(print.requestId, print);
    this.#store();
  }

  get(requestId: string): SavedPrint | undefined {
    return this.#prints.get(requestId);
  }

  remove(requestId: string): void {
    if (this.#prints.delete(requestId)) this.#store();
  }

  #store(): void {
    try {
      sessionStorage.setItem(STORAGE_KEY, JSON.stringify(this.all));
    } catch {
      // The storage is full or disabled. The page works nevertheless, but a reload loses its prints.
    }
  }
}

function load(): readonly SavedPrint[] {
  try {
    const saved: unknown = JSON.parse(sessionStorage.getItem(STORAGE_KEY) ?? "[]");
    return Array.isArray(saved) ? saved.filter(({ requestId }) => typeof requestId === "string") : [];
  } catch {
    return [];
  }
}
