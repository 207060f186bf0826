"""API keys: their format, and the file that stores their hashes.

A key is `calotype_ID_SECRET`. The id selects the record to compare with; the secret is 256 random bits. The file
contains only the SHA-256 of the whole key. Salt and a slow hash protect passwords that people choose; 256 random bits
cannot be guessed or looked up in a table, and a slow hash would let attackers keep the server busy with wrong keys.

The file is TOML with one table per key, and can be edited by hand:

```toml
[[key]]
id = "alice"
sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
role = "user"                       # or "operator", which sees the generations of all users
expires = 2027-01-01T00:00:00Z      # default: never
requests_per_minute = 60            # default for this and the next two: no limit
pixel_steps_per_minute = 100_000_000
concurrent = 4
```

A file without any key is invalid, because it is usually an accident, such as a full disk or an editor that has not
written the new content yet. `key = []` says that there are no keys, so that every caller is rejected.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import tomllib
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from calotype_server.auth.quotas import QuotaLimits
from calotype_server.errors import KeysUnusable

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["KeyRecord", "Role", "append", "digest", "key_id", "make", "read"]

_PREFIX = "calotype_"
_SECRET_CHARS = 43
"""Length of 32 bytes in URL-safe base64."""

_KEY = re.compile(rf"{_PREFIX}([A-Za-z0-9._-]{{1,64}})_[A-Za-z0-9_-]{{{_SECRET_CHARS}}}")


class Role(StrEnum):
    """Which generations a caller may list and control."""

    USER = "user"
    """Only its own generations."""
    OPERATOR = "operator"
    """The generations of all users."""


def _require_time_zone(when: datetime) -> datetime:
    if when.tzinfo is None:
        raise ValueError("has no time zone: write it as 2027-01-01T00:00:00Z")
    return when


class KeyRecord(BaseModel):
    """One key in the file. The module docstring explains the fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    role: Role = Role.USER
    expires: Annotated[datetime, AfterValidator(_require_time_zone)] | None = None
    requests_per_minute: float | None = Field(None, gt=0, allow_inf_nan=False)
    pixel_steps_per_minute: float | None = Field(None, gt=0, allow_inf_nan=False)
    concurrent: int | None = Field(None, ge=1)

    @property
    def limits(self) -> QuotaLimits:
        """Limits on the generations that callers with this key may start."""
        return QuotaLimits(self.requests_per_minute, self.pixel_steps_per_minute, self.concurrent)


def make(key_id: str) -> str:
    """Returns a new key with a random secret."""
    return f"{_PREFIX}{key_id}_{secrets.token_urlsafe(32)}"


def key_id(key: str) -> str | None:
    """Returns the id in a key, or None when `key` does not have the format of a key."""
    found = _KEY.fullmatch(key)
    return None if found is None else found[1]


def digest(key: str) -> str:
    """Returns the SHA-256 of a key in hexadecimal."""
    return hashlib.sha256(key.encode(errors="replace")).hexdigest()


def read(path: Path) -> dict[str, KeyRecord]:
    """Returns the records of a file by id.

    Raises:
        KeysUnusable: The file cannot be read, has no keys and does not say so with `key = []`, or a record is invalid.
            The message names the record and the field.
    """
    tables = _tables(path)
    if not tables:
        raise KeysUnusable(f"--api-keys: {path} contains no keys; to reject every caller, write `key = []`.")
    return _records(path, tables)


def _tables(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise KeysUnusable(f"--api-keys: {path} cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise KeysUnusable(f"--api-keys: {path} is not TOML: {error}.") from None


def _records(path: Path, tables: dict[str, Any]) -> dict[str, KeyRecord]:
    listed = tables.pop("key", [])
    if tables or not isinstance(listed, list):
        raise KeysUnusable(f"--api-keys: {path} may contain only tables named [[key]].")
    records: dict[str, KeyRecord] = {}
    for number, table in enumerate(listed, 1):
        try:
            record = KeyRecord.model_validate(table)
        except ValidationError as error:
            raise KeysUnusable(f"--api-keys: {path}, key {number}: {_format_problems(error)}.") from None
        if record.id in records:
            raise KeysUnusable(f"--api-keys: {path}, key {number}: an earlier key has the same id, {record.id!r}.")
        records[record.id] = record
    return records


def append(path: Path, record: KeyRecord) -> None:
    """Adds a record to a file. Creates the file, readable only by its owner, if it does not exist.

    Raises:
        KeysUnusable: The file is invalid, has a record with the same id, or cannot be written.
    """
    tables = _tables(path) if path.exists() else {}
    if tables.get("key") == []:
        raise KeysUnusable(f"{path} says `key = []`, no keys: remove this line first.")
    if record.id in _records(path, tables):
        raise KeysUnusable(
            f"{path} already has a key with the id {record.id!r}: choose another name, or remove that key."
        )
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a", encoding="utf-8") as file:
            file.write(_toml(record))
    except OSError as error:
        raise KeysUnusable(f"{path} cannot be written ({error.strerror}).") from None


def _toml(record: KeyRecord) -> str:
    fields = record.model_dump(exclude_none=True)
    return "\n".join(["", "[[key]]", *(f"{name} = {_value(value)}" for name, value in fields.items()), ""])


def _value(value: Any) -> str:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    return json.dumps(value)


def _format_problems(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Value error, ')}"
        for problem in error.errors(include_input=False)
    )
