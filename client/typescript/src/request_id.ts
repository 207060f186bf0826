/**
 * Creates an id for `GenerateOptions.requestId`, as hard to guess as a UUID. `crypto.randomUUID` is not an option: it
 * exists only in pages served over TLS or from localhost.
 */
export function newRequestId(): string {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
