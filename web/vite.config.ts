import { defaultClientConditions } from "vite";
import { defineConfig } from "vitest/config";

export default defineConfig({
  // Relative URLs, so that a proxy can serve the page under any prefix.
  base: "./",
  // The client package is used from its sources, so it need not be built first.
  resolve: { conditions: ["source", ...defaultClientConditions] },
  build: {
    // In the Python package, which serves the page. The output is committed, so only changes of the page require Node.
    outDir: process.env.PAGE_DIR ?? "../service/calotype_server/page",
    emptyOutDir: true,
    target: "es2022",
    // No data: URLs, which would require a weaker content security policy.
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
  },
  server: { proxy: { "/calotype.v1.GenerationService": process.env.CALOTYPE ?? "http://127.0.0.1:8080" } },
  ssr: { resolve: { conditions: ["source"] }, noExternal: ["calotype"] },
  test: {
    include: ["test/**/*.test.ts"],
    globalSetup: "test/support/cache_dir.ts",
    testTimeout: 120_000,
    hookTimeout: 120_000,
    // Generous, so that tests pass on a busy machine.
    expect: { poll: { timeout: 60_000 } },
    // Each file starts its own browser, and some their own services. More files at once would slow each other down.
    maxWorkers: 2,
  },
});
