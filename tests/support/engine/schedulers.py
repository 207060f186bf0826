"""Makes `describe` fast for pipelines whose scheduler has been examined before."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from calotype_server.engine.capabilities import model_info

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["schedulers_examined_once"]

_known: dict[tuple[Any, ...], Any] = {}
"""Results by function, scheduler, config and further arguments."""


@contextlib.contextmanager
def schedulers_examined_once() -> Iterator[None]:
    """Remembers during the block which schedulers suit a config, which takes each `describe` a second otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("compatible_schedulers", "max_step_counts"):
            patch.setattr(model_info, name, _remembering(getattr(model_info, name)))
        yield


def _remembering(function: Callable[..., Any]) -> Callable[..., Any]:
    def result(pipeline: Any, *others: Any) -> Any:
        scheduler = pipeline.scheduler
        key = function.__name__, type(scheduler), repr(sorted(scheduler.config.items())), others
        if key not in _known:
            _known[key] = function(pipeline, *others)
        return _known[key]

    return result
