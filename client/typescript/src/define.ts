/** Registers `<calotype-view>`. Import it for this effect alone. */

import { CalotypeView } from "./element/index.js";

if (!customElements.get("calotype-view")) customElements.define("calotype-view", CalotypeView);

export { CalotypeView };
