/** `<calotype-view>`: one generation, from the waiting to the finished picture. Importing this registers nothing. */

import { type Client, createClient } from "../client.js";
import { CalotypeError } from "../errors.js";
import type { Generation } from "../generation.js";
import { Pacer } from "../pacer.js";
import { frameAt, initialState, isOver, reduce, type ViewEvent, type ViewState } from "../reducer.js";
import type { FollowOptions, GenerateOptions, Picture } from "../types.js";
import { fileName, optionsOf } from "./options.js";
import { View } from "./view.js";

/** What its events carry in `detail`. All bubble and cross shadow roots. */
export interface CalotypeViewEvents {
  /** Something changed. */
  "calotype-state": CustomEvent<ViewState>;
  /** A picture has been put on the screen. */
  "calotype-picture": CustomEvent<Picture>;
  /** It ended; `status` tells how. */
  "calotype-end": CustomEvent<ViewState>;
}

// In Node there is nothing to extend, and nothing to show: importing must still work, for rendering on a server.
const Base = globalThis.HTMLElement ?? (class {} as typeof HTMLElement);

/**
 * Shows a picture while it forms, with progress, cancel, download and a filmstrip.
 *
 * Attributes: `server` (base URL, default: the page's own), `prompt`, `negative-prompt`, `width`, `height`, `steps`,
 * `guidance-scale`, `seed`, `scheduler`, `preview-every-steps`, `preview-min-interval`, `preview-max-edge`,
 * `preview-quality`, `preview-method`, `output-format`, `output-quality`, `on-disconnect`, `disconnect-grace`;
 * `autostart` begins when it enters a document. They are read by `start`. Slot `actions` takes further buttons.
 */
export class CalotypeView extends Base {
  #state = initialState;
  #options: GenerateOptions = {};
  /** What is watched; undefined when it is this element's own. */
  #watched: string | undefined;
  #client: Client | undefined;
  #generation: Generation | undefined;
  #leaving = new AbortController();
  #pacer = new Pacer<Picture>();
  #timer: ReturnType<typeof setTimeout> | undefined;
  #view: View | undefined;

  /** What is shown, see the reducer. */
  get state(): ViewState {
    return this.#state;
  }

  /** Makes the calls. Set it to share one among several views, so that they share its limit on streams. */
  get client(): Client {
    this.#client ??= createClient(this.getAttribute("server") ?? "");
    return this.#client;
  }

  set client(client: Client) {
    this.#client = client;
  }

  connectedCallback(): void {
    if (!this.#view) {
      this.#view = new View(this.attachShadow({ mode: "open" }), {
        scrub: (index) => this.#dispatch({ type: "scrub", index }),
        finish: () => void this.finish(),
        cancel: () => this.cancel(),
        retry: () => this.retry(),
        shown: (picture) => this.#emit("calotype-picture", picture),
      });
    }
    document.addEventListener("visibilitychange", this.#paint);
    this.#render();
    this.#showAgain();
    if (this.hasAttribute("autostart") && this.#state.status === "idle") this.start();
  }

  disconnectedCallback(): void {
    document.removeEventListener("visibilitychange", this.#paint);
    // Moved within the document, it is connected again by the time that this runs.
    queueMicrotask(() => {
      if (this.isConnected) return;
      this.leave();
      clearTimeout(this.#timer);
      this.#view?.release();
    });
  }

  /**
   * Begins a generation with what the attributes say; one under way is left.
   *
   * @param options - Replaces single attributes.
   */
  start(options: GenerateOptions = {}): void {
    this.#options = { ...optionsOf(this), ...options };
    this.#watched = undefined;
    this.#begin((how) => this.client.generate(this.getAttribute("prompt") ?? "", { ...this.#options, ...how }));
  }

  /** Shows a generation that somebody has started, such as this page before it was reloaded. One under way is left. */
  watch(generationId: string): void {
    this.#options = optionsOf(this);
    this.#watched = generationId;
    this.#begin((how) => this.client.watch(generationId, how));
  }

  /** Begins the same again, with the same seed where it is known; what others have begun is looked for again. */
  retry(): void {
    if (this.#watched !== undefined && !this.hasAttribute("prompt")) {
      this.watch(this.#watched);
      return;
    }
    const { seed = this.#options.seed } = this.#state;
    // The old id would only give the old end again.
    const { requestId: _, ...options } = this.#options;
    this.start(seed === undefined ? options : { ...options, seed });
  }

  /** Ends the generation early with the picture as it is. Does nothing before its first message and after its end. */
  async finish(): Promise<void> {
    const { generationId } = this.#state;
    if (generationId === undefined || isOver(this.#state)) return;
    this.#dispatch({ type: "finish", asked: true });
    try {
      await this.client.finish(generationId);
    } catch {
      // The picture goes on; whoever asked may ask again.
      if (this.#state.generationId === generationId) this.#dispatch({ type: "finish", asked: false });
    }
  }

  /** Cancels the generation on the server, for all who watch it. Does nothing when none is under way. */
  cancel(): void {
    this.#generation?.cancel();
  }

  /** Stops following. What becomes of the generation says its `on-disconnect`; by default it is cancelled. */
  leave(): void {
    this.#leaving.abort();
  }

  #begin(call: (options: FollowOptions) => Generation): void {
    this.leave();
    this.#leaving = new AbortController();
    clearTimeout(this.#timer);
    this.#pacer = new Pacer();
    this.#dispatch({ type: "start" });
    this.#view?.begin(this.#options);
    void this.#follow(call, this.#leaving.signal);
  }

  async #follow(call: (options: FollowOptions) => Generation, signal: AbortSignal): Promise<void> {
    const isCurrent = () => this.#leaving.signal === signal;
    const onReconnect = () => {
      if (isCurrent()) this.#dispatch({ type: "reconnect" });
    };
    try {
      this.#generation = undefined;
      this.#generation = call({ signal, onReconnect });
      for await (const progress of this.#generation) {
        if (!isCurrent()) return;
        if (progress.picture && !progress.previewsWithdrawn) this.#pacer.push(progress.picture, performance.now());
        this.#dispatch({ type: "progress", progress });
        this.#paint();
      }
    } catch (thrown) {
      if (!isCurrent()) return;
      const error = thrown instanceof CalotypeError ? thrown : new CalotypeError("UNKNOWN", String(thrown));
      this.#dispatch({ type: "error", error });
    }
    this.#emit("calotype-end", this.#state);
  }

  #dispatch(event: ViewEvent): void {
    this.#state = reduce(this.#state, event);
    if (this.#state.previews.length === 0 && !this.#state.final) this.#pacer.clear();
    this.#render();
    this.#emit("calotype-state", this.#state);
    if (event.type === "scrub") {
      this.#pacer.clear();
      this.#showAgain();
    }
  }

  /** Puts the picture that is looked at on the plate at once. */
  #showAgain(): void {
    const picture = frameAt(this.#state);
    if (picture) void this.#view?.show(picture, 0);
  }

  #render(): void {
    // Away from the document nothing is drawn, or it would keep pictures that nobody sees.
    if (!this.isConnected) return;
    const prompt = this.getAttribute("prompt") ?? "";
    const { final, seed } = this.#state;
    this.#view?.update(this.#state, prompt, final && fileName(prompt, seed, final.format));
  }

  /** Puts the picture on the plate that is due, and comes back for the next. A hidden page waits. */
  readonly #paint = (): void => {
    clearTimeout(this.#timer);
    if (document.hidden || !this.isConnected) return;
    const picture = this.#pacer.take(performance.now());
    if (picture) void this.#view?.show(picture, picture.kind === "final" ? FINAL_FADE_MS : this.#pacer.interval);
    const due = this.#pacer.due();
    if (due !== undefined) this.#timer = setTimeout(this.#paint, Math.max(due - performance.now(), 0));
  };

  #emit<K extends keyof CalotypeViewEvents>(name: K, detail: CalotypeViewEvents[K]["detail"]): void {
    this.dispatchEvent(new CustomEvent(name, { detail, bubbles: true, composed: true }));
  }
}

const FINAL_FADE_MS = 300;

declare global {
  interface HTMLElementTagNameMap {
    "calotype-view": CalotypeView;
  }
  interface HTMLElementEventMap extends CalotypeViewEvents {}
}
