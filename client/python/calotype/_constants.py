"""Timeouts and limits. The TypeScript client has the same names and values in `src/constants.ts`."""

__all__ = [
    "CONTROL_TIMEOUT_SECONDS",
    "DISCONNECT_GRACE_SECONDS",
    "LOADING_TIMEOUT_SECONDS",
    "MAX_MEMBERS",
    "RETRIES",
    "RETRY_BASE_SECONDS",
    "RETRY_MAX_SECONDS",
    "STALL_TIMEOUT_SECONDS",
]

RETRIES = 10
"""Reconnection attempts in a row that may fail: about half a minute with the waits below, enough until the next process
listens. The answers of a server that loads its model do not count."""

RETRY_BASE_SECONDS = 0.25
"""Longest wait before the first attempt. It doubles with each attempt."""

RETRY_MAX_SECONDS = 8.0
"""Longest wait before any attempt."""

DISCONNECT_GRACE_SECONDS = 10
"""How long the server keeps a generation that has no reader, unless the caller sets `disconnect_grace`."""

LOADING_TIMEOUT_SECONDS = 600.0
"""How long a call without a timeout waits for a server that loads its model. `loading_timeout` changes it."""

STALL_TIMEOUT_SECONDS = 20.0
"""Silence after which a server counts as lost: twice the interval of its heartbeats."""

MAX_MEMBERS = 64
"""Most generations that one call starts as a group."""

CONTROL_TIMEOUT_SECONDS = 10.0
"""Deadline of calls that the server answers immediately: cancel, finish, list, and describe the model."""
