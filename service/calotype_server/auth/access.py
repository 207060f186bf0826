"""Who calls, and what they may see and start. Knows no transport: every one asks here.

```
caller = access.admit(authorization, peer)        # raises Unauthenticated
generation = generations.find(id, caller)         # raises GenerationNotFound, also for what is another's
await generations.start(job, terms, caller.quota) # raises RateLimited
```

Without keys everybody is let in, told apart by host, and whoever has the id of a generation can watch, cancel and
finish it. With keys nobody sees that others exist: what is theirs is not found, as if it had never been.
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

_NOBODY = "0" * 64
"""Compared with where there is no such key, so that this takes as long; no digest that anybody knows a key for."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose call it is.

    Attributes:
        id: What its generations belong to, and what shares the server evenly: its key, or its host.
        role: What it may see.
        has_key: Whether it has shown one; otherwise the server asks for none.
        quota: What it may start, or None for whatever there is room for.
    """

    id: str
    role: Role = Role.USER
    has_key: bool = False
    quota: Quota | None = field(default=None, compare=False, repr=False)

    def reaches(self, owner: str) -> bool:
        """Whether it may watch, cancel and finish, by id, what belongs to `owner`."""
        return not self.has_key or self.lists(owner)

    def lists(self, owner: str) -> bool:
        """Whether what belongs to `owner` is in its lists."""
        return self.role is Role.OPERATOR or owner == self.id

    def require(self, role: Role) -> None:
        """Raises `RoleRequired` unless it has that role. Without keys everybody has every role."""
        if self.has_key and role is Role.OPERATOR and self.role is not Role.OPERATOR:
            raise errors.RoleRequired("Your key is not an operator's.")


class Access:
    """The keys that open this server.

    Args:
        path: File of the keys, or None to let everybody in.
        now: Seconds of the system's clock, for expiry.
        clock: Seconds that never go back, for rates.

    Raises:
        KeysUnusable: The file cannot be used.
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
        """What to `reload` for, when it changes."""
        return () if self._path is None else (self._path,)

    def reload(self) -> None:
        """Reads the file again. What callers have used of limits that stay the same still counts.

        Raises:
            KeysUnusable: The file cannot be used; what was read before still holds.
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

    def admit(self, authorization: str | None, peer: str) -> Caller:
        """Returns whose call it is.

        Args:
            authorization: The header of that name, such as "Bearer calotype_alice_...", or None when there is none.
            peer: As gRPC writes addresses, such as ipv4:127.0.0.1:4711.

        Raises:
            KeyRequired: There is no header.
            KeyInvalid: It holds no key of this server.
            KeyExpired: It holds one that was good for a while.
        """
        if self._path is None:
            # Every connection has a port of its own, and stands for the same caller.
            return Caller(peer.rpartition(":")[0])
        if authorization is None:
            raise errors.KeyRequired("This server asks for an API key: send it as `authorization: Bearer KEY`.")
        scheme, _, key = authorization.partition(" ")
        found = self._keys.get(keys.key_id(key.strip()) or "")
        known = _NOBODY if found is None else found[0].sha256
        matches = hmac.compare_digest(keys.digest(key.strip()), known)
        if found is None or not matches or scheme.lower() != "bearer":
            raise errors.KeyInvalid("The API key is not valid.")
        record, quota = found
        if record.expires is not None and datetime.fromtimestamp(self._now(), UTC) >= record.expires:
            raise errors.KeyExpired(f"The API key has expired at {record.expires.isoformat()}.")
        return Caller(f"key:{record.id}", record.role, has_key=True, quota=quota)


def bearer_in_subprotocols(offered: Sequence[str]) -> str | None:
    """Returns the `authorization` that a WebSocket carries as the subprotocol `calotype.bearer.KEY`, or None.

    A browser's WebSocket cannot set headers, and a key in a URL ends up in logs and histories. The server must accept
    another one of the offered subprotocols, never this one, which it would send back. (A browser's EventSource has
    neither: pages use `fetch` where keys are asked for.)
    """
    found = next((each for each in offered if each.startswith(_SUBPROTOCOL)), None)
    return None if found is None else f"Bearer {found.removeprefix(_SUBPROTOCOL)}"
