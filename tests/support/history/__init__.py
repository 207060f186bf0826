"""Records the events of a run, as callers, the store and the log show them, and checks the invariants afterwards.

A test that breaks things cannot foresee each outcome. It records the whole history instead and asks whether any promise
was broken, as Jepsen does for databases.
"""

from __future__ import annotations

from support.history.checks import CHECKS, Violation, violations
from support.history.facts import CRASHED, SUCCEEDED
from support.history.history import History, ReaderLog
from support.history.recording import follow, read

__all__ = ["CHECKS", "CRASHED", "SUCCEEDED", "History", "ReaderLog", "Violation", "follow", "read", "violations"]
