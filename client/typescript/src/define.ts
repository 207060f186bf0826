/** Registers the element `<calotype-view>` as a side effect of the import. */

import { CalotypeView } from "./element/index.js";

if (!customElements.get("calotype-view")) customElements.define("calotype-view", CalotypeView);

export { CalotypeView };
