/** Entry point of the page: connects to the service, and wires the form to the gallery of prints. */

import { createClient } from "calotype";
import "calotype/define";
import { Composer } from "./composer";
import { connect } from "./connect";
import { Gallery } from "./gallery";
import { KeyPrompt } from "./key_prompt";
import { SavedPrints } from "./saved_prints";

/** Returns an element of index.html. */
function find<T extends HTMLElement>(id: string): T {
  const element = document.getElementById(id);
  if (!element) throw new Error(`index.html has no #${id}`);
  return element as T;
}

const keyPrompt = new KeyPrompt(find<HTMLFormElement>("key"));
// Relative to the page, because a proxy may serve it under a prefix.
const client = createClient(new URL(".", location.href).href, { apiKey: () => keyPrompt.key });
const gallery = new Gallery(
  find("prints"),
  find<HTMLTemplateElement>("print"),
  find("introduction"),
  client,
  new SavedPrints(),
);
const composer = new Composer(find<HTMLFormElement>("composer"), (request) => gallery.develop(request));
gallery.onRepeat = (request) => composer.repeat(request);

const statusElements = { model: find("model"), problem: find("problem") };

/** Shows the generation in the URL, `#watch=ID`. Every print has such a link. */
function watchLinked(): void {
  const id = new URLSearchParams(location.hash.slice(1)).get("watch");
  if (id) gallery.watch(id);
}

void connect(client, statusElements, keyPrompt, () => {
  gallery.restore();
  watchLinked();
}).then((model) => composer.enable(model));
// A key may expire or be revoked while the page is open.
gallery.onUnauthenticated = () => void connect(client, statusElements, keyPrompt);
addEventListener("hashchange", watchLinked);

// The browser closes the calls of a page that is unloaded, but not of a page in the back/forward cache.
addEventListener("pagehide", () => gallery.leave());
addEventListener("pageshow", ({ persisted }) => {
  if (persisted) gallery.restore();
});
