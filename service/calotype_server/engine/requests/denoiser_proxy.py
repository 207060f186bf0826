"""The object that replaces the denoiser in a request's view of the pipeline."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from calotype_server.engine.requests.read_only import ReadOnly

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DenoiserProxy"]


class DenoiserProxy(ReadOnly):
    """Looks like a module to a pipeline, but forwards calls to a function.

    Reading an attribute reads it from the module. Everything that would change the module, or a part of it, raises
    `ChangeRejected`: a pipeline assumes that it owns the module. Caches are neither entered nor reset.

    Args:
        module: The real module.
        answer: Called instead of the module.
        ignore_changes: Whether changes have no effect, instead of raising `ChangeRejected`: for calls whose answers do
            not matter.
    """

    __slots__ = ("_answer",)

    def __init__(self, module: Any, answer: Callable[..., Any], *, ignore_changes: bool = False) -> None:
        super().__init__(module, ignore_changes=ignore_changes)
        object.__setattr__(self, "_answer", answer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls `answer`."""
        return self._answer(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls `answer`. Pipelines use this method to skip a module's hooks."""
        return self._answer(*args, **kwargs)

    def cache_context(self, *args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
        """Does nothing: the module keeps one state per context name, and all requests use the same names."""
        return contextlib.nullcontext()

    def _reset_stateful_cache(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: a pipeline calls it when it ends, while other requests still run."""
