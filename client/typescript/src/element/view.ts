/** The shadow tree of `<calotype-view>`: renders a state and reports user actions. It has no state of its own. */

import { explain, fieldLabel } from "../explanations.js";
import { fraction, frameAt, isOver, stages, type ViewState } from "../reducer.js";
import type { GenerateOptions, Picture } from "../types.js";
import { CrossfadeImage } from "./crossfade_image.js";
import { h, setShown, setText } from "./dom.js";
import { Filmstrip, stageLabel } from "./filmstrip.js";
import { ObjectUrls } from "./object_urls.js";
import { announcement, duration, statusLine } from "./status_text.js";
import { STYLES } from "./styles.js";

export interface Actions {
  scrub(index: number): void;
  finish(): void;
  cancel(): void;
  retry(): void;
  shown(picture: Picture): void;
}

export class View {
  readonly #urls = new ObjectUrls();
  readonly #image = new CrossfadeImage(this.#urls);
  readonly #filmstrip: Filmstrip;
  readonly #bar = h("div", { className: "bar" });
  readonly #track = h(
    "div",
    {
      className: "track",
      part: "progress",
      role: "progressbar",
      "aria-label": "Progress",
      "aria-valuemin": "0",
      "aria-valuemax": "100",
    },
    this.#bar,
  );
  readonly #status = h("p", { className: "status", part: "status" });
  readonly #live = h("p", { className: "visually-hidden", role: "status" });
  readonly #notice = h("p", { className: "notice", part: "notice", hidden: true });
  readonly #error = h("div", { className: "error", part: "error", role: "alert", hidden: true });
  readonly #finish = h("button", { type: "button", part: "button finish", hidden: true }, "Good enough");
  readonly #cancel = h("button", { type: "button", part: "button cancel", hidden: true }, "Cancel");
  readonly #download = h("a", { part: "button download", hidden: true }, "Download");
  readonly #actions: Actions;
  #shownError: ViewState["error"];

  constructor(root: ShadowRoot, actions: Actions) {
    this.#actions = actions;
    const sheet = new CSSStyleSheet();
    sheet.replaceSync(STYLES);
    root.adoptedStyleSheets = [sheet];
    this.#filmstrip = new Filmstrip(this.#urls, actions.scrub);
    this.#finish.addEventListener("click", actions.finish);
    this.#cancel.addEventListener("click", actions.cancel);
    root.append(
      this.#image.element,
      this.#track,
      this.#filmstrip.element,
      this.#status,
      this.#live,
      this.#notice,
      this.#error,
      h(
        "div",
        { className: "actions", part: "actions" },
        this.#finish,
        this.#cancel,
        this.#download,
        h("slot", { name: "actions" }),
      ),
    );
  }

  /** Clears the picture before a generation starts, and sets the requested aspect ratio. */
  reset({ width, height }: GenerateOptions): void {
    this.#image.clear();
    this.#urls.keepOnly([]);
    this.#setAspectRatio(width, height);
  }

  /** Shows a picture. `fade` is in milliseconds. */
  async show(picture: Picture, fade: number): Promise<void> {
    this.#setAspectRatio(picture.width, picture.height);
    if (await this.#image.show(picture, fade)) this.#actions.shown(picture);
  }

  /** Releases the memory of all pictures, for an element that has left the document. */
  release(): void {
    this.#image.clear();
    this.#filmstrip.clear();
    this.#urls.keepOnly([]);
  }

  update(state: ViewState, prompt: string, downloadName: string | undefined): void {
    const all = stages(state);
    if (all.length === 0) this.#image.clear();
    this.#urls.keepOnly(all);

    this.#filmstrip.update(all, state.scrubbed ?? all.length - 1, state.totalSteps, isOver(state));
    this.#image.element.setAttribute("aria-label", imageLabel(state, prompt));
    const percent = Math.round(fraction(state) * 100);
    this.#track.classList.toggle("ended", isOver(state));
    setShown(this.#track, state.status !== "idle");
    this.#track.setAttribute("aria-valuenow", String(percent));
    this.#track.setAttribute("aria-valuetext", statusLine(state));
    this.#bar.style.transform = `scaleX(${fraction(state)})`;
    setText(this.#status, statusLine(state));
    setText(this.#live, announcement(state));

    setText(this.#notice, state.withdrawn ? PREVIEWS_REMOVED : state.warnings.map(({ message }) => message).join(" "));
    setShown(this.#notice, this.#notice.textContent !== "");
    this.#explain(state);

    const hadFocus = this.#cancel.matches(":focus") || this.#finish.matches(":focus");
    // Finishing early requires a preview, which becomes the final picture.
    const canFinish = state.status === "running" && !state.finishing && !state.reconnecting;
    setShown(this.#finish, canFinish && state.previews.length > 0);
    setShown(this.#cancel, state.status === "waiting" || state.status === "running");
    setShown(this.#download, state.final !== undefined);
    if (state.final && downloadName) {
      this.#download.href = this.#urls.of(state.final);
      this.#download.download = downloadName;
    } else this.#download.removeAttribute("href");
    // If the focused button disappears, move the focus to the next useful one.
    if (hadFocus && this.#cancel.hidden)
      (this.#download.hidden ? this.#error.querySelector("button") : this.#download)?.focus();
    else if (hadFocus && this.#finish.hidden) this.#cancel.focus();
  }

  #explain({ error }: ViewState): void {
    if (error === this.#shownError) return;
    this.#shownError = error;
    this.#error.replaceChildren();
    // A cancellation by the user is not shown as an error.
    this.#error.classList.toggle("neutral", error?.code === "CANCELLED");
    setShown(this.#error, error !== undefined);
    if (!error) return;
    const { title, advice, retry } = explain(error);
    const list = error.violations.map(({ field, description }) => h("li", {}, `${fieldLabel(field)} ${description}`));
    const when = error.retryAfter === undefined ? "" : ` Wait ${duration(error.retryAfter)} before you try again.`;
    const again = h("button", { type: "button", part: "button retry" }, retry ?? "");
    again.addEventListener("click", this.#actions.retry);
    this.#error.append(
      h("p", { className: "title" }, title),
      ...(list.length > 0 ? [h("ul", {}, ...list)] : []),
      h("p", {}, advice + when),
      ...(retry ? [again] : []),
    );
  }

  #setAspectRatio(width: number | undefined, height: number | undefined): void {
    if (width && height) this.#image.element.style.setProperty("--_ratio", `${width} / ${height}`);
  }
}

const PREVIEWS_REMOVED = "The previews were removed: the model's safety checker rejected this picture.";

function imageLabel(state: ViewState, prompt: string): string {
  const picture = frameAt(state);
  return picture ? `${prompt}. ${stageLabel(picture, state.totalSteps)}` : `${prompt}. No picture yet`;
}
