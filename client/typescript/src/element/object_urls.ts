/** Object URLs of pictures: each is created once, and released when its picture is no longer needed. */

import { mediaType, type Picture } from "../types.js";

export class ObjectUrls {
  readonly #urls = new Map<Picture, string>();

  /** Returns the URL of a picture's file. */
  of(picture: Picture): string {
    let url = this.#urls.get(picture);
    if (url === undefined) {
      url = URL.createObjectURL(new Blob([picture.data], { type: mediaType(picture) }));
      this.#urls.set(picture, url);
    }
    return url;
  }

  /** Releases the URLs of all other pictures. */
  keepOnly(pictures: readonly Picture[]): void {
    if (this.#urls.size === 0) return;
    const kept = new Set(pictures);
    for (const [picture, url] of this.#urls) {
      if (kept.has(picture)) continue;
      URL.revokeObjectURL(url);
      this.#urls.delete(picture);
    }
  }
}
