import { defaultClientConditions } from "vite";
import { defineConfig } from "vitest/config";

export default defineConfig({
  // The page works under any prefix that a proxy puts before it.
  base: "./",
  // The client package is used from its sources: nothing to build first.
  resolve: { conditions: ["source", ...defaultClientConditions] },
  build: {
    // Inside the Python package, which serves it. Committed, so that only who changes the page needs Node.
    outDir: process.env.PAGE_DIR ?? "../service/calotype_server/page",
    emptyOutDir: true,
    target: "es2022",
    // data: URLs would need a weaker content security policy.
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
  },
  server: { proxy: { "/calotype.v1.GenerationService": process.env.CALOTYPE ?? "http://127.0.0.1:8080" } },
  ssr: { resolve: { conditions: ["source"] }, noExternal: ["calotype"] },
  test: {
    include: ["test/**/*.test.ts"],
    testTimeout: 120_000,
    hookTimeout: 120_000,
    // A busy machine is no reason to fail.
    expect: { poll: { timeout: 60_000 } },
    // Each file starts a browser and a service of its own.
    fileParallelism: false,
  },
});
