/** `<calotype-view>`: shows one generation from the queue to the final picture. This module does not register it. */

import { type Client, createClient } from "../client.js";
import { CalotypeError } from "../errors.js";
import type { Generation } from "../generation.js";
import { Pacer } from "../pacer.js";
import { frameAt, initialState, isOver, reduce, type ViewEvent, type ViewState } from "../reducer.js";
import { isLoading } from "../resume/waits.js";
import type { FollowOptions, GenerateOptions, Picture, Reconnect } from "../types.js";
import { fileName, optionsOf } from "./options.js";
import { View } from "./view.js";

/** The events of the element, with their `detail`. All of them bubble and cross shadow roots. */
export interface CalotypeViewEvents {
  /** The state changed. */
  "calotype-state": CustomEvent<ViewState>;
  /** A picture was shown. */
  "calotype-picture": CustomEvent<Picture>;
  /** The generation ended; see `status`. */
  "calotype-end": CustomEvent<ViewState>;
}

// Node has no HTMLElement. The import must work there nevertheless, for server-side rendering.
const Base = globalThis.HTMLElement ?? (class {} as typeof HTMLElement);

/**
 * Shows a picture while it develops, with progress, cancel, download and a filmstrip.
 *
 * Attributes: `server` (base URL; default: the origin of the page), `prompt`, `negative-prompt`, `width`, `height`, `steps`,
 * `guidance-scale`, `seed`, `scheduler`, `sigmas`, `spacing`, `speed`, `loras` (such as "pixel-art:0.8, sharp"),
 * `prompt-syntax`, `group`, `preview-every-steps`, `preview-min-interval`, `preview-max-edge`, `preview-quality`,
 * `preview-method`, `output-format`, `output-quality`, `on-disconnect`, `disconnect-grace`; `autostart` starts it when it
 * enters a document. `start` reads the attributes. The slot `actions` takes more buttons.
 */
export class CalotypeView extends Base {
  #state = initialState;
  #options: GenerateOptions = {};
  /** Id of a generation started elsewhere; undefined if this element started it. */
  #watched: string | undefined;
  #client: Client | undefined;
  #generation: Generation | undefined;
  #leave = new AbortController();
  #pacer = new Pacer<Picture>();
  #timer: ReturnType<typeof setTimeout> | undefined;
  #view: View | undefined;

  /** The state that is shown, see the reducer. */
  get state(): ViewState {
    return this.#state;
  }

  /** Makes the calls. Set the same client on several views to share its limit on streams. */
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
    this.#showSelected();
    if (this.hasAttribute("autostart") && this.#state.status === "idle") this.start();
  }

  disconnectedCallback(): void {
    document.removeEventListener("visibilitychange", this.#paint);
    // If the element was only moved within the document, it is connected again when this runs.
    queueMicrotask(() => {
      if (this.isConnected) return;
      this.leave();
      clearTimeout(this.#timer);
      this.#view?.release();
    });
  }

  /**
   * Starts a generation with the options in the attributes. Leaves the current one.
   *
   * @param options - Overrides single attributes.
   */
  start(options: GenerateOptions = {}): void {
    this.#options = { ...optionsOf(this), ...options };
    this.#watched = undefined;
    this.#run((followOptions) =>
      this.client.generate(this.getAttribute("prompt") ?? "", { ...this.#options, ...followOptions }),
    );
  }

  /** Shows a generation that already exists, such as one of this page before a reload. Leaves the current one. */
  watch(generationId: string): void {
    this.#options = optionsOf(this);
    this.#watched = generationId;
    this.#run((followOptions) => this.client.watch(generationId, followOptions));
  }

  /** Starts the same generation again, with the same seed if it is known. Watches again if it was started elsewhere. */
  retry(): void {
    if (this.#watched !== undefined && !this.hasAttribute("prompt")) {
      this.watch(this.#watched);
      return;
    }
    const { seed = this.#options.seed } = this.#state;
    // The old request id would return the old generation.
    const { requestId: _, ...options } = this.#options;
    this.start(seed === undefined ? options : { ...options, seed });
  }

  /** Ends the generation early with its current picture. Does nothing before the first message and after the end. */
  async finish(): Promise<void> {
    const { generationId } = this.#state;
    if (generationId === undefined || isOver(this.#state)) return;
    this.#dispatch({ type: "finish", requested: true });
    try {
      await this.client.finish(generationId);
    } catch {
      // The generation continues, and the user can press the button again.
      if (this.#state.generationId === generationId) this.#dispatch({ type: "finish", requested: false });
    }
  }

  /** Cancels the generation on the server, for all readers. Does nothing if none is running. */
  cancel(): void {
    this.#generation?.cancel();
  }

  /** Stops following. `on-disconnect` decides what happens to the generation; by default, it is cancelled. */
  leave(): void {
    this.#leave.abort();
  }

  #run(call: (options: FollowOptions) => Generation): void {
    this.leave();
    this.#leave = new AbortController();
    clearTimeout(this.#timer);
    this.#pacer = new Pacer();
    this.#dispatch({ type: "start" });
    this.#view?.reset(this.#options);
    void this.#follow(call, this.#leave.signal);
  }

  async #follow(call: (options: FollowOptions) => Generation, signal: AbortSignal): Promise<void> {
    const isCurrent = () => this.#leave.signal === signal;
    const onReconnect = ({ error }: Reconnect) => {
      if (isCurrent()) this.#dispatch({ type: "reconnect", loading: isLoading(error) });
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
      this.#showSelected();
    }
  }

  /** Shows the selected picture at once. */
  #showSelected(): void {
    const picture = frameAt(this.#state);
    if (picture) void this.#view?.show(picture, 0);
  }

  #render(): void {
    // Outside the document, rendering would only keep pictures in memory.
    if (!this.isConnected) return;
    const prompt = this.getAttribute("prompt") ?? "";
    const { final, seed } = this.#state;
    this.#view?.update(this.#state, prompt, final && fileName(prompt, seed, final.format));
  }

  /** Shows the picture that is due, and schedules the next. Does nothing while the page is hidden. */
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
