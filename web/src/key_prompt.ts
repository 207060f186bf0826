/** Asks for the API key if the service requires one. The key stays in this tab and never becomes part of a URL. */

const STORAGE_KEY = "calotype-key";

export class KeyPrompt {
  readonly #form: HTMLFormElement;
  readonly #input: HTMLInputElement;
  #answer: Promise<void> | undefined;

  constructor(form: HTMLFormElement) {
    this.#form = form;
    this.#input = form.querySelector("input") as HTMLInputElement;
  }

  /** The key that the user entered, if any. */
  get key(): string | undefined {
    return sessionStorage.getItem(STORAGE_KEY) ?? undefined;
  }

  /** Shows the form, moves the focus to it, and waits until the user enters a key. */
  ask(): Promise<void> {
    this.#answer ??= new Promise((resolve) => {
      this.#form.hidden = false;
      this.#input.focus();
      const submit = (event: Event) => {
        event.preventDefault();
        sessionStorage.setItem(STORAGE_KEY, this.#input.value.trim());
        this.#input.value = "";
        this.#answer = undefined;
        resolve();
      };
      this.#form.addEventListener("submit", submit, { once: true });
    });
    return this.#answer;
  }

  /** Hides the form, once the service accepts calls. */
  close(): void {
    if (this.#form.hidden) return;
    this.#form.hidden = true;
    document.getElementById("prompt")?.focus();
  }
}
