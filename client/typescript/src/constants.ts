/** Defaults and limits of the client. `calotype/_constants.py` of the Python client has the same names and values. */

/**
 * Failed retries in a row after a lost connection. They wait 24 seconds on average, enough until the next process of the
 * service listens. The answers of a service that loads its model do not count.
 */
export const RETRIES = 10;

/** Upper bound of the wait before the first retry. It doubles with every further retry. */
export const RETRY_BASE_SECONDS = 0.25;

/** Upper bound of the wait before any retry. */
export const RETRY_MAX_SECONDS = 8;

/** How long the server keeps a generation without a reader, unless the request says otherwise. */
export const DISCONNECT_GRACE_SECONDS = 10;

/** How long a call without a timeout waits for a service that loads its model. `loadingTimeout` changes it. */
export const LOADING_TIMEOUT_SECONDS = 600;

/** How long the client waits for the next message of a stream. The server sends one at least every 10 seconds. */
export const STALL_TIMEOUT_SECONDS = 20;

/** Most generations that one call starts as a group. */
export const MAX_MEMBERS = 64;

/** Deadline of calls that are not streams: `cancel`, `finish`, `getModel` and each page of `generations`. */
export const CONTROL_TIMEOUT_SECONDS = 10;
