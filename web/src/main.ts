/** The page: asks for the model, takes wishes, hangs up prints. */

import { createClient } from "calotype";
import "calotype/define";
import { Album } from "./saved_prints";
import { Composer } from "./composer";
import { Gallery } from "./gallery";
import { Keyhole } from "./key_prompt";
import { connect } from "./connect";

/** Gets an element that index.html promises. */
function find<T extends HTMLElement>(id: string): T {
  const element = document.getElementById(id);
  if (!element) throw new Error(`index.html has no #${id}`);
  return element as T;
}

// Where the page is, not where the host's root is: it may sit behind a proxy's prefix.
const keyhole = new Keyhole(find<HTMLFormElement>("key"));
const client = createClient(new URL(".", location.href).href, { apiKey: () => keyhole.key });
const gallery = new Gallery(find("prints"), find<HTMLTemplateElement>("print"), find("blank"), client, new Album());
const composer = new Composer(find<HTMLFormElement>("composer"), (wish) => gallery.develop(wish));
gallery.onAgain = (wish) => composer.again(wish);

const places = { model: find("model"), trouble: find("trouble") };

/** Shows what the address names: `#watch=ID`, as the link under a print gives it. */
function watchLinked(): void {
  const id = new URLSearchParams(location.hash.slice(1)).get("watch");
  if (id) gallery.watch(id);
}

void connect(client, places, keyhole, () => {
  gallery.restore();
  watchLinked();
}).then((model) => composer.open(model));
// A key that expires, or is withdrawn, while the page is open.
gallery.onLockedOut = () => void connect(client, places, keyhole);
addEventListener("hashchange", watchLinked);

// The browser drops the calls of a page that goes; one that is only kept in memory must leave them itself.
addEventListener("pagehide", () => gallery.leave());
addEventListener("pageshow", ({ persisted }) => {
  if (persisted) gallery.restore();
});
