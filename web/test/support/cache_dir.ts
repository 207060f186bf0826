/** A cache folder for the services of all test files, so that only the first one calibrates. */

import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { TestProject } from "vitest/node";

declare module "vitest" {
  export interface ProvidedContext {
    cacheDir: string;
  }
}

export default function setup(project: TestProject): () => void {
  const folder = mkdtempSync(join(tmpdir(), "calotype-"));
  project.provide("cacheDir", folder);
  return () => rmSync(folder, { recursive: true, force: true });
}
