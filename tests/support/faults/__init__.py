"""Injects faults at failpoints, in this process and in servers, and detects leaks."""

from __future__ import annotations

from support.faults.injection import ACTIONS, EXIT_CODE, KINDS, Fault, Faults, Panic, full_disk

__all__ = ["ACTIONS", "EXIT_CODE", "KINDS", "Fault", "Faults", "Panic", "full_disk"]
