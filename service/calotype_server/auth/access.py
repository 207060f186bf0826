"""Identifies callers, and decides what they may see and start. Every transport uses this module.

```
caller = access.authenticate(authorization, peer)     # raises Unauthenticated
generation = generations.find(id, caller)             # raises GenerationNotFound, also for generations of others
generations.start(job, delivery, caller.quota)        # raises RateLimited when its block is entered
```

Without API keys, every call is accepted, callers are distinguished by host, and every caller that knows the id of a
generation can watch, cancel and finish it. With API keys, users cannot see each other: generations of other users are
reported as not found.
"""

from __future__ import annotations

import hmac
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from calotype_server import errors
from calotype_server.auth import keys
from calotype_server.auth.keys import Role
from calotype_server.auth.quotas import Quota

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from calotype_server.auth.keys import KeyRecord

__all__ = ["Access", "Caller", "bearer_in_subprotocols"]

_SUBPROTOCOL = "calotype.bearer."

_UNKNOWN_DIGEST = "0" * 64
"""Compared with when the key id is unknown, so that timing does not reveal which ids exist. No known key has it."""


@dataclass(frozen=True, slots=True)
class Caller:
    """The identity behind a call.

    Attributes:
        id: `key:` and the id of its API key, or its host. Owns generations and gets an even share of the server.
        role: Decides which generations it may list and control.
        has_key: Whether it sent an API key. False means that the server requires none.
        quota: Limits on the generations that it may start, or None for no limits.
    """

    id: str
    role: Role = Role.USER
    has_key: bool = False
    quota: Quota | None = field(default=None, compare=False, repr=False)

    def can_access(self, owner: str) -> bool:
        """Whether the caller may watch, cancel and finish generations of `owner` by id."""
        return not self.has_key or self.can_list(owner)

    def can_list(self, owner: str) -> bool:
        """Whether the caller's lists include generations of `owner`."""
        return self.role is Role.OPERATOR or owner == self.id

    def require(self, role: Role) -> None:
        """Raises `RoleRequired` unless the caller has the role. Without API keys, every caller has every role."""
        if self.has_key and role is Role.OPERATOR and self.role is not Role.OPERATOR:
            raise errors.RoleRequired("This needs an API key with the role operator.")


class Access:
    """Checks API keys against a file.

    Args:
        path: File of API keys, or None to accept every caller.
        now: Returns Unix time in seconds, for expiry.
        clock: Returns monotonic seconds, for rates.

    Raises:
        KeysUnusable: The file cannot be read or is invalid.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._now = now
        self._clock = clock
        self._keys: Mapping[str, tuple[KeyRecord, Quota]] = {}
        self.reload()

    @property
    def files(self) -> Sequence[Path]:
        """The files to watch: call `reload` when they change."""
        return () if self._path is None else (self._path,)

    def reload(self) -> None:
        """Reads the file again. Keys whose limits are unchanged keep their usage so far.

        Raises:
            KeysUnusable: The file cannot be read or is invalid. The old keys stay valid.
        """
        if self._path is None:
            return
        fresh: dict[str, tuple[KeyRecord, Quota]] = {}
        for record in keys.read(self._path).values():
            _, quota = self._keys.get(record.id, (None, None))
            if quota is None or quota.limits != record.limits:
                quota = Quota(record.limits, self._clock)
            fresh[record.id] = record, quota
        self._keys = fresh

    def authenticate(self, authorization: str | None, peer: str) -> Caller:
        """Returns the caller that a call belongs to.

        Args:
            authorization: The `authorization` header, such as "Bearer calotype_alice_...", or None.
            peer: The client's address in gRPC notation, such as ipv4:127.0.0.1:4711.

        Raises:
            KeyRequired: The server has API keys and `authorization` is None.
            KeyInvalid: The header contains no key of this server.
            KeyExpired: The header contains a key that has expired.
        """
        if self._path is None:
            # All connections of a host are the same caller, so the port is left out.
            return Caller(peer.rpartition(":")[0])
        if authorization is None:
            raise errors.KeyRequired("This server requires an API key: send it as `authorization: Bearer KEY`.")
        scheme, _, key = authorization.partition(" ")
        found = self._keys.get(keys.key_id(key.strip()) or "")
        known = _UNKNOWN_DIGEST if found is None else found[0].sha256
        matches = hmac.compare_digest(keys.digest(key.strip()), known)
        if found is None or not matches or scheme.lower() != "bearer":
            raise errors.KeyInvalid("The API key is not valid.")
        record, quota = found
        if record.expires is not None and datetime.fromtimestamp(self._now(), UTC) >= record.expires:
            raise errors.KeyExpired(f"The API key expired at {record.expires.isoformat()}.")
        return Caller(f"key:{record.id}", record.role, has_key=True, quota=quota)


def bearer_in_subprotocols(offered: Sequence[str]) -> str | None:
    """Returns the `authorization` that a WebSocket sends as the subprotocol `calotype.bearer.KEY`, or None.

    Browsers cannot set headers on a WebSocket, and a key in a URL would appear in logs and histories. The server must
    accept one of the other offered subprotocols, because it would send the accepted one, and so the key, back.
    (EventSource supports neither headers nor subprotocols; pages use `fetch` when the server requires keys.)
    """
    found = next((each for each in offered if each.startswith(_SUBPROTOCOL)), None)
    return None if found is None else f"Bearer {found.removeprefix(_SUBPROTOCOL)}"
