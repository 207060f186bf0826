"""The lines of a report of `calotype doctor`."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Finding"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report; `advice` says how to fix the problem when `ok` is false."""

    ok: bool
    subject: str
    result: str
    advice: str = ""
