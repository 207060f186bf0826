/**
 * Draws an id for `GenerateOptions.requestId`, as unguessable as a UUID. `crypto.randomUUID` is only there in pages that
 * came over TLS or from localhost.
 */
export function newRequestId(): string {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
