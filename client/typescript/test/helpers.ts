/** Helpers for tests of the client. */

import { expect, onTestFinished } from "vitest";
import { CalotypeError, type ClientOptions, createClient, type Progress } from "../src/index.js";
import { type Handlers, StubServer } from "./stub_server.js";

/** Starts a service with these handlers until the test has finished, and a client for it. */
export async function serve(handlers: Handlers, options: ClientOptions = {}) {
  const stub = new StubServer(handlers);
  stopAfterTest(stub);
  return { client: createClient(await stub.start(), options), stub };
}

export function stopAfterTest(stub: StubServer): void {
  onTestFinished(() => stub.stop());
}

/** Returns the `CalotypeError` that a promise rejects with. */
export async function errorOf(promise: Promise<unknown>): Promise<CalotypeError> {
  const thrown = await promise.then(
    () => undefined,
    (error: unknown) => error,
  );
  expect(thrown).toBeInstanceOf(CalotypeError);
  return thrown as CalotypeError;
}

export async function collect(stream: AsyncIterable<Progress>): Promise<Progress[]> {
  const messages: Progress[] = [];
  for await (const message of stream) messages.push(message);
  return messages;
}
