"""Named places where tests inject failures, delays, hangs and process exits.

A failpoint does nothing unless a test sets its action. No setting, environment variable or request sets one. The idea
and the name are those of FreeBSD's `fail(9)` and Rust's crate `fail`.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["FAILPOINTS", "hit", "injected"]

FAILPOINTS = frozenset(
    {
        "store.open",
        "store.load",
        "store.accept",
        "store.attempt",
        "store.end",
        "store.forget",
        "store.call",
        "runner.start",
        "runner.end",
        "encoder.preview",
        "encoder.final",
        "engine.run",
        "engine.step",
        "engine.batch",
        "engine.preview",
        "engine.report",
        "grpc.call",
        "grpc.message",
        "grpcweb.call",
        "grpcweb.message",
        "http.call",
        "http.message",
    }
)
"""All names. `tests/faults/` has a test for each."""

_actions: dict[str, Callable[[], object]] = {}


def hit(name: str) -> None:
    """Performs the action of the failpoint `name`, if a test has set one: it may raise, block or end the process."""
    if action := _actions.get(name):
        action()


@contextlib.contextmanager
def injected(name: str, action: Callable[[], object]) -> Iterator[None]:
    """Sets the action of a failpoint for the duration of the block. Only for tests.

    Args:
        name: One of `FAILPOINTS`.
        action: Called in the thread that reaches the failpoint.

    Raises:
        KeyError: There is no failpoint with this name.
    """
    if name not in FAILPOINTS:
        raise KeyError(name)
    _actions[name] = action
    try:
        yield
    finally:
        del _actions[name]
