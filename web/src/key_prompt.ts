/** Asks for the API key where the service wants one. It is kept in this tab alone, and never in an address. */

const STORAGE = "calotype-key";

export class Keyhole {
  readonly #form: HTMLFormElement;
  readonly #input: HTMLInputElement;
  #asking: Promise<void> | undefined;

  constructor(form: HTMLFormElement) {
    this.#form = form;
    this.#input = form.querySelector("input") as HTMLInputElement;
  }

  /** The key that was entered, if one was. */
  get key(): string | undefined {
    return sessionStorage.getItem(STORAGE) ?? undefined;
  }

  /** Shows the form until a key is entered, and puts the cursor into it. */
  ask(): Promise<void> {
    this.#asking ??= new Promise((resolve) => {
      this.#form.hidden = false;
      this.#input.focus();
      const submit = (event: Event) => {
        event.preventDefault();
        sessionStorage.setItem(STORAGE, this.#input.value.trim());
        this.#input.value = "";
        this.#asking = undefined;
        resolve();
      };
      this.#form.addEventListener("submit", submit, { once: true });
    });
    return this.#asking;
  }

  /** Takes the form away: the key was right, or none is wanted. */
  close(): void {
    if (this.#form.hidden) return;
    this.#form.hidden = true;
    document.getElementById("prompt")?.focus();
  }
}
