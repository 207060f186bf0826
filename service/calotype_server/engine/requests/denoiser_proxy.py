"""The object that replaces the denoiser in a request's view of the pipeline."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DenoiserProxy"]


class DenoiserProxy:
    """Looks like a module to a pipeline, but forwards calls to a function.

    Reading an attribute reads it from the module. A pipeline assumes that it owns the module, so the proxy blocks
    everything that would change the shared one: caches are neither entered nor reset, and attributes are read-only.

    Args:
        module: The real module.
        answer: Called instead of the module.
    """

    __slots__ = ("_answer", "_module")

    def __init__(self, module: Any, answer: Callable[..., Any]) -> None:
        object.__setattr__(self, "_module", module)
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

    @property  # type: ignore[misc]  # typeshed gives it a setter
    def __class__(self) -> Any:
        """The module's class, so that a pipeline that looks for a module to find its device finds this proxy."""
        return type(self._module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{name!r} cannot be set: the {type(self._module).__name__} is shared by all requests.")
