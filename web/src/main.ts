/** The page: asks for the model, takes wishes, hangs up prints. */

import { createClient } from "calotype";
import "calotype/define";
import { Album } from "./album";
import { Composer } from "./composer";
import { Gallery } from "./gallery";
import { connect } from "./service";

/** Gets an element that index.html promises. */
function find<T extends HTMLElement>(id: string): T {
  const element = document.getElementById(id);
  if (!element) throw new Error(`index.html has no #${id}`);
  return element as T;
}

// Where the page is, not where the host's root is: it may sit behind a proxy's prefix.
const client = createClient(new URL(".", location.href).href);
const gallery = new Gallery(find("prints"), find<HTMLTemplateElement>("print"), find("blank"), client, new Album());
const composer = new Composer(find<HTMLFormElement>("composer"), (wish) => gallery.develop(wish));
gallery.onAgain = (wish) => composer.again(wish);

void connect(client, { model: find("model"), trouble: find("trouble") }).then((model) => composer.open(model));

/** Shows what the address names: `#watch=ID`, as the link under a print gives it. */
function watchLinked(): void {
  const id = new URLSearchParams(location.hash.slice(1)).get("watch");
  if (id) gallery.watch(id);
}

gallery.restore();
watchLinked();
addEventListener("hashchange", watchLinked);

// The browser drops the calls of a page that goes; one that is only kept in memory must leave them itself.
addEventListener("pagehide", () => gallery.leave());
addEventListener("pageshow", ({ persisted }) => {
  if (persisted) gallery.restore();
});
