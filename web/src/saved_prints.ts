/** What this tab shows, kept for as long as the tab lives, so that a reload loses nothing. */

import type { Wish } from "./generation_request";

/** A print as it is kept. */
export interface Entry {
  /** The request's id: beginning it twice gives one generation. */
  readonly requestId: string;
  /** Its generation, once that is known. */
  readonly generationId?: string | undefined;
  /** What was asked for; undefined for one that somebody else has begun. */
  readonly wish?: Wish | undefined;
}

const KEY = "calotype.prints";

export class Album {
  readonly #entries: Map<string, Entry>;

  constructor() {
    this.#entries = new Map(read().map((entry) => [entry.requestId, entry]));
  }

  /** Everything that is kept, oldest first. */
  get entries(): readonly Entry[] {
    return [...this.#entries.values()];
  }

  /** Keeps an entry, in place of an older one of the same request. */
  keep(entry: Entry): void {
    this.#entries.set(entry.requestId, entry);
    this.#write();
  }

  get(requestId: string): Entry | undefined {
    return this.#entries.get(requestId);
  }

  forget(requestId: string): void {
    if (this.#entries.delete(requestId)) this.#write();
  }

  #write(): void {
    try {
      sessionStorage.setItem(KEY, JSON.stringify(this.entries));
    } catch {
      // No room, or not allowed: the page works all the same, until it is reloaded.
    }
  }
}

function read(): readonly Entry[] {
  try {
    const kept: unknown = JSON.parse(sessionStorage.getItem(KEY) ?? "[]");
    return Array.isArray(kept) ? kept.filter(({ requestId }) => typeof requestId === "string") : [];
  } catch {
    return [];
  }
}
